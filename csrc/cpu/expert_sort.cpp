// Stable counting sort of expert ids. The sorted order is unique, so the result does not depend on
// how many threads share the work.
#include <algorithm>
#include <limits>
#include <vector>

#include "check.h"
#include "ops.h"

namespace unimoe {
namespace {

// Minimum number of ids per thread; with fewer, distributing them takes longer than sorting.
constexpr int64_t kIdsPerChunk = 16384;

// Sentinels and all other ids that are not those of an expert belong to the last bucket.
template <typename Id>
int64_t bucket_of(Id id, int64_t num_experts) {
  return id < 0 ? num_experts : std::min(static_cast<int64_t>(id), num_experts);
}

template <typename Id>
void sort(const Id* id, int64_t rows, int64_t num_experts, int32_t* order, int32_t* inverse,
          int32_t* offsets) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t chunks =
      std::max<int64_t>(1, std::min(threads, (rows + kIdsPerChunk - 1) / kIdsPerChunk));
  const int64_t chunk_rows = (rows + chunks - 1) / chunks;
  const int64_t buckets = num_experts + 1;

  // next[chunk][bucket]: first the chunk's histogram, then the position of its next row of a
  // bucket.
  std::vector<int32_t> next(chunks * buckets, 0);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      int32_t* histogram = next.data() + chunk * buckets;
      const int64_t last = std::min(rows, (chunk + 1) * chunk_rows);
      for (int64_t n = chunk * chunk_rows; n < last; ++n)
        ++histogram[bucket_of(id[n], num_experts)];
    }
  });

  int32_t position = 0;
  for (int64_t bucket = 0; bucket < buckets; ++bucket) {
    offsets[bucket] = position;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      int32_t& slot = next[chunk * buckets + bucket];
      const int32_t count = slot;
      slot = position;
      position += count;
    }
  }

  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      int32_t* slots = next.data() + chunk * buckets;
      const int64_t last = std::min(rows, (chunk + 1) * chunk_rows);
      for (int64_t n = chunk * chunk_rows; n < last; ++n) {
        const int32_t to = slots[bucket_of(id[n], num_experts)]++;
        order[to] = static_cast<int32_t>(n);
        inverse[n] = to;
      }
    }
  });
}

}  // namespace

void sort_rows(const Tensor& ids, int64_t num_experts, int32_t* order, int32_t* inverse,
               int32_t* offsets) {
  UNIMOE_CHECK(num_experts >= 1, "num_experts (", num_experts, ") must be at least 1");
  UNIMOE_CHECK(ids.is_contiguous(), "ids must be contiguous");
  const int64_t rows = ids.numel();
  UNIMOE_CHECK(rows <= std::numeric_limits<int32_t>::max(), "ids (", rows,
               " rows) must have fewer than 2^31");
  if (ids.scalar_type() == ScalarType::Long) {
    return sort(const_data<int64_t>(ids), rows, num_experts, order, inverse, offsets);
  }
  UNIMOE_CHECK(ids.scalar_type() == ScalarType::Int, "ids must be int32 or int64");
  sort(const_data<int32_t>(ids), rows, num_experts, order, inverse, offsets);
}

Sorted expert_sort(Tensor ids, int64_t num_experts) {
  check_ids_vector(ids, "ids");
  UNIMOE_CHECK(num_experts >= 1, "num_experts (", num_experts, ") must be at least 1");
  const int64_t rows = ids.size(0);
  Tensor row_order = empty({rows}, ScalarType::Int, ids);
  Tensor inverse_order = empty({rows}, ScalarType::Int, ids);
  Tensor tokens_per_expert = empty({num_experts}, ScalarType::Int, ids);
  Tensor expert_offsets = empty({num_experts + 1}, ScalarType::Int, ids);
  int32_t* offsets = mutable_data<int32_t>(expert_offsets);
  sort_rows(ids, num_experts, mutable_data<int32_t>(row_order),
            mutable_data<int32_t>(inverse_order), offsets);
  int32_t* counts = mutable_data<int32_t>(tokens_per_expert);
  for (int64_t e = 0; e < num_experts; ++e) counts[e] = offsets[e + 1] - offsets[e];
  return {row_order, inverse_order, tokens_per_expert, expert_offsets};
}

}  // namespace unimoe

STABLE_TORCH_LIBRARY_IMPL(unimoe, CPU, m) {
  m.impl("expert_sort", TORCH_BOX(&unimoe::expert_sort));
}
