// Packs the weights of all experts once rather than in every call.
#include "packed_weight.h"

#include "check.h"

namespace unimoe {
namespace {

// Packs [E, sides * F, D] into the panels of each expert, [E, units]. The layout depends on the
// instruction set in use and is not valid in another process.
Tensor pack_weight(Tensor weight, int64_t sides) {
  UNIMOE_CHECK(weight.dim() == 3 && sides >= 1 && sides <= 2 && weight.size(1) % sides == 0,
               "weight (shape ", shape_of(weight), ") must be [E, ", sides, " * F, D]");
  const int64_t units = packed_units(weight, sides);
  const Kernels& chosen = kernels();
  Tensor packed = empty({weight.size(0), units}, ScalarType::Int, weight);
  dispatch_floating(weight.scalar_type(), "weight", [&](auto element) {
    using T = decltype(element);
    if constexpr (std::is_same_v<T, double>) {
      UNIMOE_CHECK(false,
                   "weight must not be float64: matmuls in float64 do not use packed weights");
    } else {
      const Activation gated{};
      with_units<T>(chosen, [&](auto unit) {
        using U = decltype(unit);
        const int64_t columns = weight.size(1) / sides, depth = weight.size(2);
        const int64_t width = panels_of<U>(chosen).columns;
        const int64_t panels = parts_of(columns, width);
        const int64_t panel = sides * width * steps_of<U>(chosen, depth);
        for_each_task(weight.size(0) * panels, [&](int64_t task) {
          const int64_t expert = task / panels, p = task % panels;
          const Operand<T> right{const_data<T>(weight) + expert * weight.stride(0),
                                 weight.stride(1), weight.stride(2)};
          const Product<T> product{{},    right,   0,       columns,
                                   depth, nullptr, nullptr, sides == 2 ? &gated : nullptr};
          U* const to = reinterpret_cast<U*>(mutable_data<int32_t>(packed)) + expert * units;
          pack_right(chosen, product, p, 1, to + p * panel);
        });
      });
    }
  });
  return packed;
}

}  // namespace
}  // namespace unimoe

STABLE_TORCH_LIBRARY_IMPL(unimoe, CPU, m) {
  m.impl("pack_weight", TORCH_BOX(&unimoe::pack_weight));
}
