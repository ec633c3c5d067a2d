// Token permutation: copies rows into expert order, and sums the rows of each token.
#include <algorithm>
#include <cstring>
#include <vector>

#include "check.h"
#include "kernels.h"
#include "ops.h"

namespace unimoe {
namespace {

// Minimum number of bytes per thread: waking a thread takes as long as copying some tens of KB.
constexpr int64_t kBytesPerTask = 64 * 1024;
// Columns summed at a time; the partial sums of a block fit into the L1 cache.
constexpr int64_t kColumns = 512;
// Number of partial sums of a dot product, which determines the order of additions.
constexpr int64_t kLanes = 16;

int64_t rows_per_task(int64_t row_bytes) {
  return std::max<int64_t>(1, kBytesPerTask / std::max<int64_t>(1, row_bytes));
}

int32_t routed_rows(const Tensor& expert_offsets) {
  return const_data<int32_t>(expert_offsets)[expert_offsets.size(0) - 1];
}

}  // namespace

Tensor permute(Tensor x, Tensor inverse_order, Tensor expert_offsets, int64_t top_k) {
  check_matrix(x, "x");
  check_floating(x, "x");
  check_offsets(expert_offsets);
  check_int32_vector(inverse_order, "inverse_order");
  check_top_k(top_k, "inverse_order", inverse_order.size(0));
  const int64_t tokens = x.size(0);
  check_rows(inverse_order, "inverse_order", tokens * top_k);

  Tensor out = empty({tokens * top_k, x.size(1)}, x.scalar_type(), x);
  const int64_t row_bytes = x.size(1) * static_cast<int64_t>(x.element_size());
  if (row_bytes == 0) return out;
  const char* from = const_data<char>(x);
  char* to = mutable_data<char>(out);
  const int32_t* position = const_data<int32_t>(inverse_order);
  const int64_t routed = routed_rows(expert_offsets);
  const int64_t grain = rows_per_task(top_k * row_bytes);
  torch::stable::parallel_for(0, tokens, grain, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin * top_k; n < end * top_k; ++n) {
      char* row = to + position[n] * row_bytes;
      if (position[n] < routed) {
        std::memcpy(row, from + n / top_k * row_bytes, row_bytes);
      } else {
        std::memset(row, 0, row_bytes);
      }
    }
  });
  return out;
}

namespace {

// The routed rows of one token in k order, and their weights.
template <typename T>
struct TokenRows {
  std::vector<const T*> rows;
  std::vector<Accumulator<T>> weights;

  // `score` is null if every weight is 1.
  void set(const T* from, int64_t width, const int32_t* position, const Accumulator<T>* score,
           int64_t top_k, int64_t routed) {
    rows.clear();
    weights.clear();
    for (int64_t k = 0; k < top_k; ++k) {
      if (position[k] >= routed) continue;
      rows.push_back(from + position[k] * width);
      weights.push_back(score ? score[k] : Accumulator<T>(1));
    }
  }
};

template <typename T>
void sum_rows(const Kernels& kernels, const TokenRows<T>& token, const TokenRows<T>& next,
              int64_t width, T* out) {
  const int64_t count = token.rows.size(), next_count = next.rows.size();
  if constexpr (std::is_same_v<T, float>) {
    return kernels.weighted_sum(count, token.rows.data(), token.weights.data(), next_count,
                                next.rows.data(), width, out);
  }
  if constexpr (std::is_same_v<T, BFloat16>) {
    return kernels.weighted_sum_bfloat16(
        count, reinterpret_cast<const uint16_t* const*>(token.rows.data()), token.weights.data(),
        next_count, reinterpret_cast<const uint16_t* const*>(next.rows.data()), width,
        bits_of(out));
  }
  using Sum = Accumulator<T>;
  Sum sums[kColumns];
  for (int64_t first = 0; first < width; first += kColumns) {
    const int64_t columns = std::min(kColumns, width - first);
    std::fill_n(sums, columns, Sum(0));
    for (int64_t k = 0; k < count; ++k) {
      const T* row = token.rows[k] + first;
      for (int64_t d = 0; d < columns; ++d) sums[d] += token.weights[k] * static_cast<Sum>(row[d]);
    }
    for (int64_t d = 0; d < columns; ++d) out[first + d] = static_cast<T>(sums[d]);
  }
}

}  // namespace

template <typename T>
void sum_token_rows(const T* rows, const int32_t* inverse, int64_t routed,
                    const Accumulator<T>* scores, int64_t tokens, int64_t top_k, int64_t width,
                    T* out) {
  const Kernels& fast = kernels();
  const int64_t grain = rows_per_task(width * top_k * static_cast<int64_t>(sizeof(T)));
  torch::stable::parallel_for(0, tokens, grain, [&](int64_t begin, int64_t end) {
    TokenRows<T> token, next;
    const auto set = [&](TokenRows<T>& held, int64_t t) {
      held.set(rows, width, inverse + t * top_k, scores ? scores + t * top_k : nullptr, top_k,
               routed);
    };
    set(next, begin);
    for (int64_t t = begin; t < end; ++t) {
      std::swap(token, next);
      if (t + 1 < end) set(next, t + 1);
      sum_rows(fast, token, next, width, out + t * width);
    }
  });
}

template void sum_token_rows(const float*, const int32_t*, int64_t, const float*, int64_t, int64_t,
                             int64_t, float*);
template void sum_token_rows(const double*, const int32_t*, int64_t, const double*, int64_t,
                             int64_t, int64_t, double*);
template void sum_token_rows(const BFloat16*, const int32_t*, int64_t, const float*, int64_t,
                             int64_t, int64_t, BFloat16*);
template void sum_token_rows(const Half*, const int32_t*, int64_t, const float*, int64_t, int64_t,
                             int64_t, Half*);

Tensor unpermute(Tensor rows, Tensor inverse_order, Tensor expert_offsets,
                 std::optional<Tensor> scores, int64_t top_k) {
  check_matrix(rows, "rows");
  check_offsets(expert_offsets);
  check_rows(inverse_order, "inverse_order", rows.size(0));
  check_top_k(top_k, "rows", rows.size(0));
  const int64_t tokens = rows.size(0) / top_k;
  const int64_t width = rows.size(1);
  if (scores) check_scores(*scores, rows, tokens, top_k);

  Tensor out = empty({tokens, width}, rows.scalar_type(), rows);
  const int32_t* inverse = const_data<int32_t>(inverse_order);
  const int64_t routed = routed_rows(expert_offsets);
  dispatch_floating(rows.scalar_type(), "rows", [&](auto element) {
    using T = decltype(element);
    using Sum = Accumulator<T>;
    sum_token_rows(const_data<T>(rows), inverse, routed,
                   scores ? const_data<Sum>(*scores) : nullptr, tokens, top_k, width,
                   mutable_data<T>(out));
  });
  return out;
}

namespace {

// One routed row: writes its gradient and returns that of its score.
template <typename T>
Accumulator<T> scale_and_dot(T* grad_row, const T* grad, const T* row, Accumulator<T> weight,
                             int64_t width) {
  using Sum = Accumulator<T>;
  Sum lanes[kLanes] = {};
  int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const Sum g = static_cast<Sum>(grad[d + lane]);
      grad_row[d + lane] = static_cast<T>(weight * g);
      lanes[lane] += g * static_cast<Sum>(row[d + lane]);
    }
  }
  for (; d < width; ++d) {
    const Sum g = static_cast<Sum>(grad[d]);
    grad_row[d] = static_cast<T>(weight * g);
    lanes[d % kLanes] += g * static_cast<Sum>(row[d]);
  }
  Sum total = 0;
  for (const Sum lane : lanes) total += lane;
  return total;
}

std::tuple<Tensor, Tensor> unpermute_backward(Tensor grad, Tensor rows, Tensor inverse_order,
                                              Tensor expert_offsets, Tensor scores, int64_t top_k) {
  check_matrix(rows, "rows");
  check_offsets(expert_offsets);
  check_rows(inverse_order, "inverse_order", rows.size(0));
  check_top_k(top_k, "rows", rows.size(0));
  const int64_t tokens = rows.size(0) / top_k;
  const int64_t width = rows.size(1);
  check_scores(scores, rows, tokens, top_k);
  check_grad(grad, rows, tokens);

  Tensor grad_rows = empty({rows.size(0), width}, rows.scalar_type(), rows);
  Tensor grad_scores = empty({tokens, top_k}, scores.scalar_type(), scores);
  const int32_t* inverse = const_data<int32_t>(inverse_order);
  const int64_t routed = routed_rows(expert_offsets);
  dispatch_floating(rows.scalar_type(), "rows", [&](auto element) {
    using T = decltype(element);
    using Sum = Accumulator<T>;
    const T* out_grad = const_data<T>(grad);
    const T* row = const_data<T>(rows);
    const Sum* score = const_data<Sum>(scores);
    T* row_grad = mutable_data<T>(grad_rows);
    Sum* score_grad = mutable_data<Sum>(grad_scores);
    const int64_t grain = rows_per_task(width * static_cast<int64_t>(sizeof(T)));
    torch::stable::parallel_for(0, tokens * top_k, grain, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        const int64_t at = inverse[n] * width;
        if (inverse[n] >= routed) {
          std::fill_n(row_grad + at, width, T(0));
          score_grad[n] = Sum(0);
          continue;
        }
        score_grad[n] =
            scale_and_dot(row_grad + at, out_grad + n / top_k * width, row + at, score[n], width);
      }
    });
  });
  return {grad_rows, grad_scores};
}

}  // namespace
}  // namespace unimoe

STABLE_TORCH_LIBRARY_IMPL(unimoe, CPU, m) {
  m.impl("permute", TORCH_BOX(&unimoe::permute));
  m.impl("unpermute", TORCH_BOX(&unimoe::unpermute));
  m.impl("unpermute_backward", TORCH_BOX(&unimoe::unpermute_backward));
}
