// A stacked weight in a quantised format, as operators are given it.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "check.h"
#include "product.h"

namespace unimoe {

class QuantizedWeight {
 public:
  // Values [E, out, in], or of "int4" [E, out, in / 2]; scales and zeros [E, out, groups].
  QuantizedWeight(const Tensor& values, const Tensor& scales, const std::optional<Tensor>& zeros,
                  const std::string& format, const std::string& name) {
    UNIMOE_CHECK(format == "int8" || format == "int4", "format (", format,
                 ") must be int8 or int4");
    const bool four_bits = format == "int4";
    UNIMOE_CHECK(values.dim() == 3 && values.is_contiguous() &&
                     values.scalar_type() == (four_bits ? ScalarType::Byte : ScalarType::Char),
                 name, " values (shape ", shape_of(values), ") must be [E, out, in], contiguous, ",
                 four_bits ? "uint8" : "int8");
    experts_ = values.size(0), rows_ = values.size(1);
    depth_ = values.size(2) * (four_bits ? 2 : 1);
    const ScalarType dtype = scales.scalar_type();
    UNIMOE_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, name,
                 " scales must be float32 or bfloat16");
    check_groups(scales, name + " scales");
    const int64_t groups = scales.size(2);
    UNIMOE_CHECK(groups >= 1 && depth_ >= 1 && depth_ % groups == 0 &&
                     (!four_bits || depth_ / groups % 32 == 0),
                 name, " scales (shape ", shape_of(scales), ") must have groups that share ",
                 depth_, " numbers evenly");
    if (zeros) {
      UNIMOE_CHECK(four_bits && zeros->scalar_type() == ScalarType::Byte, name,
                   " zeros must be uint8, with int4");
      check_groups(*zeros, name + " zeros");
      UNIMOE_CHECK(zeros->size(2) == groups, name, " zeros (shape ", shape_of(*zeros),
                   ") must have ", groups, " groups");
    }
    const QuantizedRows all{four_bits,
                            dtype == ScalarType::BFloat16,
                            depth_,
                            depth_ / groups,
                            const_data<uint8_t>(values),
                            scales.const_data_ptr(),
                            zeros ? const_data<uint8_t>(*zeros) : nullptr};
    for (int64_t e = 0; e < experts_; ++e) of_experts_.push_back(all.from(e * rows_));
  }

  int64_t experts() const { return experts_; }
  int64_t lines() const { return rows_; }
  int64_t depth() const { return depth_; }

  // Makes the weight of an expert the right operand of a product.
  template <typename T>
  void attach(Product<T>& product, int64_t expert, bool transposed = false) {
    const QuantizedRows& rows = of_experts_[expert];
    if constexpr (std::is_same_v<T, double>) {
      floats_.push_back(std::make_unique<double[]>(rows_ * depth_));
      double* to = floats_.back().get();
      for (int64_t row = 0; row < rows_; ++row) read(rows.from(row), to + row * depth_);
      product.right = {to, transposed ? 1 : depth_, transposed ? depth_ : 1};
    } else {
      product.quantized = &rows;
      product.transposed = transposed;
    }
  }

 private:
  void check_groups(const Tensor& part, const std::string& name) const {
    UNIMOE_CHECK(part.dim() == 3 && part.is_contiguous() && part.size(0) == experts_ &&
                     part.size(1) == rows_,
                 name, " (shape ", shape_of(part), ") must be [", experts_, ", ", rows_,
                 ", groups], contiguous");
  }

  // One row in float64, which serves gradient checks.
  static void read(const QuantizedRows& row, double* to) {
    for (int64_t i = 0; i < row.depth; ++i) {
      const int64_t group = i / row.group;
      const double scale = row.narrow_scales
                               ? to_float(static_cast<const uint16_t*>(row.scales)[group])
                               : static_cast<const float*>(row.scales)[group];
      int integer = static_cast<int8_t>(row.values[row.four_bits ? i / 2 : i]);
      if (row.four_bits) {
        integer = i % 2 == 0 ? integer & 15 : integer >> 4 & 15;
        integer -= row.zeros == nullptr ? 8 : row.zeros[group];
      }
      to[i] = scale * integer;
    }
  }

  int64_t experts_, rows_, depth_;
  std::vector<QuantizedRows> of_experts_;
  std::vector<std::unique_ptr<double[]>> floats_;
};

}  // namespace unimoe
