// Token permutation: copies rows into expert order and sums them back, with the widest vectors (at
// most 16 bytes) that the row's width and alignment allow. In the sums a warp works on one row.
#include <algorithm>

#include "launch.cuh"
#include "routed_rows.h"

namespace unimoe {
namespace {

constexpr int kRowsPerBlock = 8;
// Vectors of a row that one warp processes; wider rows are split between blocks, so that a few
// tokens still fill the device.
constexpr int kVectorsPerWarp = 4 * kWarp;
constexpr int kVectorBytes = 16;
constexpr int kCopyThreads = 256;
constexpr int64_t kCopyBlocks = 1024;  // enough to fill any device
constexpr int kCopyBatch = 8;          // rows of a token whose positions a thread holds at a time

template <typename T, int N>
struct alignas(sizeof(T) * N) Vector {
  T values[N];
};

LaunchShape rows_shape(int64_t rows, int64_t vectors) {
  const int64_t splits = std::max<int64_t>(1, ceil_div<int64_t>(vectors, kVectorsPerWarp));
  UNIMOE_CHECK(splits <= 65535, "rows of ", vectors, " vectors are too wide");
  return {dim3(static_cast<unsigned>(ceil_div<int64_t>(rows, kRowsPerBlock)),
               static_cast<unsigned>(splits)),
          dim3(kWarp, kRowsPerBlock)};
}

bool is_aligned(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

__device__ int64_t row_of_warp() {
  return static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.y;
}

// The copy is independent of the dtype: Bytes is an unsigned integer or uint4. A token is read once
// and written to its K rows with streaming stores, which do not evict it from the cache. On an H100
// (T 32768, D 2048, K 8) such a kernel took 437 us, and one by row, which reads a token K times,
// 704 us.
template <typename Bytes>
__global__ void __launch_bounds__(kCopyThreads)
    permute_kernel(const Bytes* __restrict__ x, const int* __restrict__ inverse_order,
                   const int* __restrict__ routed_rows, Bytes* __restrict__ out, int64_t tokens,
                   int64_t vectors, int top_k) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (t >= tokens) return;
  const int routed = *routed_rows;
  const int* position = inverse_order + t * top_k;
  const int64_t stride = static_cast<int64_t>(gridDim.y) * blockDim.x;
  for (int64_t v = static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x; v < vectors;
       v += stride) {
    const Bytes value = x[t * vectors + v];
    for (int first = 0; first < top_k; first += kCopyBatch) {
      int to[kCopyBatch];
#pragma unroll
      for (int k = 0; k < kCopyBatch; ++k) to[k] = first + k < top_k ? position[first + k] : -1;
#pragma unroll
      for (int k = 0; k < kCopyBatch; ++k) {
        if (to[k] >= 0) __stcs(out + to[k] * vectors + v, to[k] < routed ? value : Bytes{});
      }
    }
  }
}

// Threads along a row, as many tokens as fit in beside, and where these blocks are too few to fill
// a device, a row shared between blocks.
LaunchShape copy_shape(int64_t tokens, int64_t vectors) {
  const int64_t threads =
      std::min<int64_t>(kCopyThreads, kWarp * ceil_div<int64_t>(vectors, kWarp));
  const int64_t in_block = kCopyThreads / std::max<int64_t>(1, threads);
  const int64_t blocks = ceil_div(tokens, in_block);
  const int64_t shares = std::min(ceil_div(vectors, std::max<int64_t>(1, threads)),
                                  ceil_div(kCopyBlocks, std::max<int64_t>(1, blocks)));
  return {dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(shares)),
          dim3(static_cast<unsigned>(threads), static_cast<unsigned>(in_block))};
}

template <typename Bytes>
void launch_permute(const Tensor& x, const Tensor& inverse_order, const int* routed_rows,
                    Tensor& out, int64_t row_bytes, int64_t top_k) {
  const int64_t vectors = row_bytes / static_cast<int64_t>(sizeof(Bytes));
  launch(permute_kernel<Bytes>, copy_shape(x.size(0), vectors), x, const_data<Bytes>(x),
         const_data<int>(inverse_order), routed_rows, mutable_data<Bytes>(out), x.size(0), vectors,
         top_k);
}

const int* last_offset(const Tensor& expert_offsets) {
  return const_data<int>(expert_offsets) + expert_offsets.size(0) - 1;
}

}  // namespace

Tensor gpu::permute(Tensor x, Tensor inverse_order, Tensor expert_offsets, int64_t top_k) {
  check_matrix(x, "x");
  check_floating(x, "x");
  check_offsets(expert_offsets);
  check_int32_vector(inverse_order, "inverse_order");
  check_same_device(inverse_order, "inverse_order", x);
  check_same_device(expert_offsets, "expert_offsets", x);
  check_top_k(top_k, "inverse_order", inverse_order.size(0));
  check_rows(inverse_order, "inverse_order", x.size(0) * top_k);

  Tensor out = empty({inverse_order.size(0), x.size(1)}, x.scalar_type(), x);
  const int* routed = last_offset(expert_offsets);
  const int64_t row_bytes = x.size(1) * static_cast<int64_t>(x.element_size());
  if (row_bytes == 0) return out;
  const void* from = x.const_data_ptr();
  const auto fits = [&](int64_t bytes) {
    return row_bytes % bytes == 0 && is_aligned(from, bytes);
  };
  if (fits(16)) {
    launch_permute<uint4>(x, inverse_order, routed, out, row_bytes, top_k);
  } else if (fits(8)) {
    launch_permute<uint2>(x, inverse_order, routed, out, row_bytes, top_k);
  } else if (fits(4)) {
    launch_permute<unsigned>(x, inverse_order, routed, out, row_bytes, top_k);
  } else {
    launch_permute<unsigned short>(x, inverse_order, routed, out, row_bytes, top_k);
  }
  return out;
}

namespace {

// out[t] = sum over k, in k order, of score * row; `scores` is null where every weight is 1.
template <typename T, int N>
__global__ void unpermute_kernel(const T* __restrict__ rows, const int* __restrict__ inverse_order,
                                 const int* __restrict__ routed_rows,
                                 const Accumulator<T>* __restrict__ scores, T* __restrict__ out,
                                 int64_t tokens, int64_t vectors, int top_k) {
  using Sum = Accumulator<T>;
  const int64_t t = row_of_warp();
  if (t >= tokens) return;
  const int routed = *routed_rows;
  const auto* from = reinterpret_cast<const Vector<T, N>*>(rows);
  auto* to = reinterpret_cast<Vector<T, N>*>(out) + t * vectors;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kVectorsPerWarp;
  const int64_t last = min(first + kVectorsPerWarp, vectors);
  for (int64_t v = first + threadIdx.x; v < last; v += kWarp) {
    Sum sums[N] = {};
    for (int k = 0; k < top_k; ++k) {
      const int64_t n = t * top_k + k;
      const int64_t position = inverse_order[n];
      if (position >= routed) continue;
      const Sum weight = scores ? scores[n] : Sum(1);
      const Vector<T, N> row = from[position * vectors + v];
#pragma unroll
      for (int d = 0; d < N; ++d) sums[d] += weight * static_cast<Sum>(row.values[d]);
    }
    Vector<T, N> result;
#pragma unroll
    for (int d = 0; d < N; ++d) result.values[d] = static_cast<T>(sums[d]);
    to[v] = result;
  }
}

// Calls `body` with the number of elements of a vector, as a type.
template <typename T, typename Body>
void dispatch_vector(int64_t width, std::initializer_list<const void*> pointers, Body&& body) {
  constexpr int n = kVectorBytes / static_cast<int>(sizeof(T));
  const bool aligned = std::all_of(pointers.begin(), pointers.end(), [](const void* pointer) {
    return is_aligned(pointer, kVectorBytes);
  });
  if (aligned && width % n == 0) {
    body(std::integral_constant<int, n>{});
  } else {
    body(std::integral_constant<int, 1>{});
  }
}

}  // namespace

Tensor gpu::unpermute(Tensor rows, Tensor inverse_order, Tensor expert_offsets,
                      std::optional<Tensor> scores, int64_t top_k) {
  check_matrix(rows, "rows");
  check_offsets(expert_offsets);
  check_rows(inverse_order, "inverse_order", rows.size(0));
  check_same_device(inverse_order, "inverse_order", rows);
  check_same_device(expert_offsets, "expert_offsets", rows);
  check_top_k(top_k, "rows", rows.size(0));
  const int64_t tokens = rows.size(0) / top_k;
  const int64_t width = rows.size(1);
  if (scores) {
    check_scores(*scores, rows, tokens, top_k);
    check_same_device(*scores, "scores", rows);
  }

  Tensor out = empty({tokens, width}, rows.scalar_type(), rows);
  dispatch_floating(rows.scalar_type(), "rows", [&](auto element) {
    using T = decltype(element);
    using Sum = Accumulator<T>;
    dispatch_vector<T>(width, {rows.const_data_ptr(), out.const_data_ptr()}, [&](auto n) {
      launch(unpermute_kernel<T, n>, rows_shape(tokens, width / n), rows, const_data<T>(rows),
             const_data<int>(inverse_order), last_offset(expert_offsets),
             scores ? const_data<Sum>(*scores) : nullptr, mutable_data<T>(out), tokens, width / n,
             top_k);
    });
  });
  return out;
}

namespace {

// One warp for a routed row: its gradient, and the dot product that is the gradient of its score.
// The lanes' partial sums are added in a fixed order.
template <typename T, int N>
__global__ void unpermute_backward_kernel(const T* __restrict__ grad, const T* __restrict__ rows,
                                          const int* __restrict__ inverse_order,
                                          const int* __restrict__ routed_rows,
                                          const Accumulator<T>* __restrict__ scores,
                                          T* __restrict__ grad_rows,
                                          Accumulator<T>* __restrict__ grad_scores,
                                          int64_t num_rows, int64_t vectors, int top_k) {
  using Sum = Accumulator<T>;
  const int64_t n = row_of_warp();
  if (n >= num_rows) return;
  const int64_t position = inverse_order[n];
  const bool routed = position < *routed_rows;
  const Sum weight = scores[n];
  const auto* out_grad = reinterpret_cast<const Vector<T, N>*>(grad) + n / top_k * vectors;
  const auto* row = reinterpret_cast<const Vector<T, N>*>(rows) + position * vectors;
  auto* row_grad = reinterpret_cast<Vector<T, N>*>(grad_rows) + position * vectors;
  Sum dot = 0;
  for (int64_t v = threadIdx.x; v < vectors; v += kWarp) {
    Vector<T, N> result{};
    if (routed) {
      const Vector<T, N> g = out_grad[v];
      const Vector<T, N> r = row[v];
#pragma unroll
      for (int d = 0; d < N; ++d) {
        result.values[d] = static_cast<T>(weight * static_cast<Sum>(g.values[d]));
        dot += static_cast<Sum>(g.values[d]) * static_cast<Sum>(r.values[d]);
      }
    }
    row_grad[v] = result;
  }
  for (int step = kWarp / 2; step > 0; step /= 2) dot += __shfl_down_sync(kFullWarp, dot, step);
  if (threadIdx.x == 0) grad_scores[n] = dot;
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
  check_same_device(inverse_order, "inverse_order", rows);
  check_same_device(expert_offsets, "expert_offsets", rows);
  check_same_device(scores, "scores", rows);
  check_same_device(grad, "grad", rows);

  Tensor grad_rows = empty({rows.size(0), width}, rows.scalar_type(), rows);
  Tensor grad_scores = empty({tokens, top_k}, scores.scalar_type(), scores);
  // A warp reduces a whole row, so the columns are not split over blocks.
  LaunchShape shape = rows_shape(rows.size(0), 0);
  dispatch_floating(rows.scalar_type(), "rows", [&](auto element) {
    using T = decltype(element);
    using Sum = Accumulator<T>;
    const std::initializer_list<const void*> pointers = {
        rows.const_data_ptr(), grad.const_data_ptr(), grad_rows.const_data_ptr()};
    dispatch_vector<T>(width, pointers, [&](auto n) {
      launch(unpermute_backward_kernel<T, n>, shape, rows, const_data<T>(grad), const_data<T>(rows),
             const_data<int>(inverse_order), last_offset(expert_offsets), const_data<Sum>(scores),
             mutable_data<T>(grad_rows), mutable_data<Sum>(grad_scores), rows.size(0), width / n,
             top_k);
    });
  });
  return {grad_rows, grad_scores};
}

}  // namespace
}  // namespace unimoe

STABLE_TORCH_LIBRARY_IMPL(unimoe, CUDA, m) {
  m.impl("permute", TORCH_BOX(&unimoe::gpu::permute));
  m.impl("unpermute", TORCH_BOX(&unimoe::gpu::unpermute));
  m.impl("unpermute_backward", TORCH_BOX(&unimoe::unpermute_backward));
}
