// Weights of experts that are packed once, for layers that are called often.
#pragma once

#include "matmul.h"

namespace unimoe {

// Number of 32-bit units in the panels of one expert.
inline int64_t packed_units(const Tensor& weight, int64_t sides) {
  const Kernels& chosen = kernels();
  const bool pairs =
      weight.scalar_type() == ScalarType::BFloat16 && chosen.multiply_pairs != nullptr;
  const int64_t width = (pairs ? chosen.pair_panels : chosen.float_panels).columns;
  const int64_t depth = weight.size(2);
  const int64_t steps = pairs ? steps_of<uint32_t>(chosen, depth) : steps_of<float>(chosen, depth);
  return parts_of(weight.size(1) / sides, width) * sides * width * steps;
}

// The output of `pack_weight` for a weight, or nothing.
class PackedWeight {
 public:
  PackedWeight(const std::optional<Tensor>& packed, const char* name, const Tensor& weight,
               int64_t sides) {
    if (!packed) return;
    units_ = packed_units(weight, sides);
    UNIMOE_CHECK(packed->scalar_type() == ScalarType::Int && packed->dim() == 2 &&
                     packed->is_contiguous() && packed->size(0) == weight.size(0) &&
                     packed->size(1) == units_,
                 name, " (shape ", shape_of(*packed), ") must be int32 [", weight.size(0), ", ",
                 units_, "]");
    data_ = const_data<int32_t>(*packed);
  }

  const void* of_expert(int64_t expert) const {
    return data_ == nullptr ? nullptr : data_ + expert * units_;
  }

 private:
  const int32_t* data_ = nullptr;
  int64_t units_ = 0;
};

}  // namespace unimoe
