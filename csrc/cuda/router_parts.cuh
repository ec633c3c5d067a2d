// Counts and sums of each block of the router's forward, and the kernel that adds them up in the
// order of the blocks, so that the losses are the same every run.
#pragma once

#include "router_token.cuh"

namespace unimoe {

constexpr int kReduceLanes = 32;  // blocks whose sums are added at a time

// chosen, counted, probabilities [blocks, experts]; squares, tokens [blocks]. The first block sets
// `ticket` to 0 for the kernel that adds up.
template <typename S>
struct Parts {
  int* chosen;
  int* counted;
  S* probabilities;
  double* squares;
  int* tokens;
  int* ticket;
};

// What a warp knows beside its sums of probabilities.
struct WarpCounts {
  double square = 0;
  int tokens = 0;

  template <typename S>
  __device__ void add(const TokenSums<S>& token) {
    const double z = static_cast<double>(token.logsumexp());
    square += z * z;
    ++tokens;
  }
};

// Writes the part of a block; `probability_of(e, warp)` is the sum of a warp.
template <typename S, typename ProbabilityOf>
__device__ void write_part(const Parts<S>& parts, int experts, const int* chosen,
                           const int* counted, const WarpCounts& own,
                           const ProbabilityOf& probability_of) {
  __shared__ double squares[kMaxWarps];
  __shared__ int tokens[kMaxWarps];
  const int warps = blockDim.y, thread = threadIdx.y * kWarp + threadIdx.x;
  if (threadIdx.x == 0) {
    squares[threadIdx.y] = own.square;
    tokens[threadIdx.y] = own.tokens;
  }
  __syncthreads();
  for (int e = thread; e < experts; e += warps * kWarp) {
    S sum = 0;
    for (int w = 0; w < warps; ++w) sum += probability_of(e, w);
    const int64_t at = static_cast<int64_t>(blockIdx.x) * experts + e;
    parts.probabilities[at] = sum;
    parts.chosen[at] = chosen[e];
    parts.counted[at] = counted[e];
  }
  if (thread != 0) return;
  double square = 0;
  int counted_tokens = 0;
  for (int w = 0; w < warps; ++w) {
    square += squares[w];
    counted_tokens += tokens[w];
  }
  parts.squares[blockIdx.x] = square;
  parts.tokens[blockIdx.x] = counted_tokens;
  if (blockIdx.x == 0) *parts.ticket = 0;
}

// A block adds up the parts of kWarp experts; the last one to finish adds up their shares in the
// order of the blocks.
template <typename S>
__global__ void __launch_bounds__(kWarp* kReduceLanes)
    reduce_kernel(const int* __restrict__ chosen_counts, const int* __restrict__ counted_counts,
                  const S* __restrict__ probabilities, const double* __restrict__ squares,
                  const int* __restrict__ tokens_counted, int* __restrict__ tokens_per_expert,
                  double* __restrict__ shares, int* __restrict__ ticket,
                  S* __restrict__ load_balancing_loss, S* __restrict__ router_z_loss, int parts,
                  int experts, int choices) {
  __shared__ double probability[kReduceLanes][kWarp];
  __shared__ int chosen[kReduceLanes][kWarp], counted[kReduceLanes][kWarp];
  const int e = blockIdx.x * kWarp + threadIdx.x;
  double probability_sum = 0;
  int chosen_sum = 0, counted_sum = 0;
  if (e < experts) {
#pragma unroll 4
    for (int part = threadIdx.y; part < parts; part += kReduceLanes) {
      const int64_t at = static_cast<int64_t>(part) * experts + e;
      probability_sum += static_cast<double>(probabilities[at]);
      chosen_sum += chosen_counts[at];
      counted_sum += counted_counts[at];
    }
  }
  probability[threadIdx.y][threadIdx.x] = probability_sum;
  chosen[threadIdx.y][threadIdx.x] = chosen_sum;
  counted[threadIdx.y][threadIdx.x] = counted_sum;
  __syncthreads();
  if (threadIdx.y != 0) return;
  for (int lane = 1; lane < kReduceLanes; ++lane) {
    probability_sum += probability[lane][threadIdx.x];
    chosen_sum += chosen[lane][threadIdx.x];
    counted_sum += counted[lane][threadIdx.x];
  }
  if (e < experts) tokens_per_expert[e] = chosen_sum;
  const double share = warp_sum(probability_sum * counted_sum);
  int finished = 0;
  if (threadIdx.x == 0) {
    shares[blockIdx.x] = share;
    __threadfence();
    finished = atomicAdd(ticket, 1);
  }
  if (__shfl_sync(kFullWarp, finished, 0) != static_cast<int>(gridDim.x) - 1) return;
  __threadfence();
  // A single lane would wait for memory hundreds of times in sequence.
  double tokens = 0, square = 0, balancing = 0;
  for (int part = threadIdx.x; part < parts; part += kWarp) {
    tokens += tokens_counted[part];
    square += squares[part];
  }
  const volatile double* all = shares;
  for (unsigned block = threadIdx.x; block < gridDim.x; block += kWarp) balancing += all[block];
  tokens = warp_sum(tokens);
  square = warp_sum(square);
  balancing = warp_sum(balancing);
  if (threadIdx.x != 0) return;
  tokens = tokens < 1 ? 1 : tokens;  // it is a divisor
  *load_balancing_loss = static_cast<S>(experts * balancing / (tokens * choices * tokens));
  *router_z_loss = static_cast<S>(square / tokens);
}

}  // namespace unimoe
