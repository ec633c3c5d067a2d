// Gradient of `topk_router` with respect to the logits, one warp per token. A first kernel counts
// the choices, on which the load-balancing loss depends; each block of the second adds up these
// counts. Atomics are used only on integers.
#include "router_lanes.cuh"
#include "router_shared.cuh"

namespace unimoe {
namespace {

constexpr int64_t kCountBlocks = 32;  // all blocks of the second kernel read what these count
constexpr int kCountThreads = 1024;
constexpr int kCountBatch = 4;  // ids that a thread waits for at a time
constexpr int64_t kMaxBlocks = 512;

// Writes to counts[block, e] the counted choices of expert e, and to counts[block, experts] the
// counted tokens.
__global__ void __launch_bounds__(kCountThreads)
    count_kernel(const int* __restrict__ ids, const bool* __restrict__ mask,
                 int* __restrict__ counts, int64_t tokens, int top_k, int choices, int experts) {
  extern __shared__ int histogram[];
  for (int e = threadIdx.x; e <= experts; e += blockDim.x) histogram[e] = 0;
  __syncthreads();
  const int64_t total = tokens * choices, step = static_cast<int64_t>(blockDim.x) * kCountBatch;
  int counted = 0;
  for (int64_t start = blockIdx.x * step; start < total; start += gridDim.x * step) {
    int chosen[kCountBatch];
#pragma unroll
    for (int i = 0; i < kCountBatch; ++i) {
      const int64_t n = start + i * blockDim.x + threadIdx.x;
      const int64_t t = n / choices;
      const bool counts_here = n < total && (mask == nullptr || mask[t]);
      chosen[i] = counts_here ? ids[t * top_k + n % choices] : -1;
      counted += counts_here && n % choices == 0;
    }
#pragma unroll
    for (int i = 0; i < kCountBatch; ++i) {
      const unsigned peers = __match_any_sync(kFullWarp, chosen[i]);
      // One lane adds for all lanes with the same expert, because all choices may be equal.
      if (chosen[i] >= 0 && (peers & ((1u << threadIdx.x % kWarp) - 1)) == 0) {
        atomicAdd(&histogram[chosen[i]], __popc(peers));
      }
    }
  }
  counted = warp_sum(counted);
  if (threadIdx.x % kWarp == 0) atomicAdd(&histogram[experts], counted);
  __syncthreads();
  for (int e = threadIdx.x; e <= experts; e += blockDim.x) {
    counts[static_cast<int64_t>(blockIdx.x) * (experts + 1) + e] = histogram[e];
  }
}

// Adds up the counts of `parts` blocks.
__device__ void add_counts(const int* __restrict__ counts, int parts, int experts, int* sums) {
  for (int e = threadIdx.y * kWarp + threadIdx.x; e <= experts; e += blockDim.y * kWarp) {
    int sum = 0;
#pragma unroll 8
    for (int part = 0; part < parts; ++part) {
      sum += counts[static_cast<int64_t>(part) * (experts + 1) + e];
    }
    sums[e] = sum;
  }
  __syncthreads();
}

template <typename S>
struct Incoming {
  const S* scores;
  const S* balancing;
  const S* z;
};

// Gradients of the losses for a token: `unit` times the count of an expert for its probability, and
// `slope` times the softmax for the logit.
template <typename S>
struct TokenGrads {
  bool counted;
  S unit, slope;

  __device__ TokenGrads(const Incoming<S>& grads, const TokenSums<S>& token, bool counted,
                        int counted_tokens, const RouterCall& routing)
      : counted(counted), unit(0), slope(0) {
    if (!counted) return;
    const S n = static_cast<S>(max(counted_tokens, 1));
    unit = *grads.balancing * S(routing.experts) / (n * S(routing.choices)) / n;
    slope = S(2) * token.logsumexp() * (*grads.z / n);
  }
};

// The gradient that a chosen expert receives through its score.
template <typename S>
__device__ S grad_of_choice(Mode mode, const Chosen<S>& all, const TokenSums<S>& token, S logit,
                            S given, S inner) {
  if (mode == Mode::kSigmoid) return given;
  if (mode == Mode::kSigmoidRenorm) return (given - inner) / all.sum;
  if (mode == Mode::kSoftmaxTopk) return token.softmax(logit) * given;
  return all.score(mode, token, logit) * (given - inner);
}

template <typename T, typename S>
__global__ void route_backward_kernel(Incoming<S> grads, const T* __restrict__ logits,
                                      const int* __restrict__ ids, const bool* __restrict__ mask,
                                      const int* __restrict__ counts, T* __restrict__ out,
                                      int64_t tokens, int parts, RouterCall routing, S scale) {
  extern __shared__ __align__(16) unsigned char shared[];
  const int experts = routing.experts, top_k = routing.top_k;
  const Mode mode = routing.mode;
  const bool sigmoid_mode = is_sigmoid(mode);
  S* logit = reinterpret_cast<S*>(shared) + static_cast<int64_t>(threadIdx.y) * 3 * experts;
  S* grad = logit + experts;
  S* sigmoid = sigmoid_mode ? grad + experts : nullptr;
  int* count =
      reinterpret_cast<int*>(reinterpret_cast<S*>(shared) + 3 * int64_t{blockDim.y} * experts);
  add_counts(counts, parts, experts, count);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t t = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; t < tokens;
       t += stride) {
    const TokenSums<S> token = read_token(logits + t * experts, experts, logit, sigmoid);
    const TokenGrads<S> loss(grads, token, mask == nullptr || mask[t], count[experts], routing);
    S inner = 0;
    for (int e = threadIdx.x; e < experts; e += kWarp) {
      const S probability = sigmoid_mode ? sigmoid[e] / token.sigmoid_sum : token.softmax(logit[e]);
      grad[e] = loss.unit * static_cast<S>(count[e]);
      // A token that does not count may be NaN.
      inner += loss.counted ? grad[e] * probability : S(0);
    }
    inner = warp_sum(inner);
    for (int e = threadIdx.x; e < experts; e += kWarp) {
      const S centred = loss.counted ? grad[e] - inner : S(0);
      grad[e] = sigmoid_mode ? centred / token.sigmoid_sum : token.softmax(logit[e]) * centred;
    }
    __syncwarp();
    const int* chosen = ids + t * top_k;
    const S* own = grads.scores + t * top_k;
    const Chosen<S> all(mode, top_k, [&](int k) { return logit[chosen[k]]; });
    S chosen_inner = 0;
    for (int k = threadIdx.x; k < top_k; k += kWarp) {
      chosen_inner += own[k] * scale * all.score(mode, token, logit[chosen[k]]);
    }
    chosen_inner = warp_sum(chosen_inner);
    // A token selects an expert only once, so no two lanes add to the same expert.
    for (int k = threadIdx.x; k < top_k; k += kWarp) {
      const S value = logit[chosen[k]];
      grad[chosen[k]] += grad_of_choice(mode, all, token, value, own[k] * scale, chosen_inner);
    }
    __syncwarp();
    for (int e = threadIdx.x; e < experts; e += kWarp) {
      const S softmax = token.softmax(logit[e]);
      S value = grad[e];
      if (mode == Mode::kSoftmaxTopk) value -= softmax * chosen_inner;
      if (sigmoid_mode) value *= sigmoid[e] * (S(1) - sigmoid[e]);
      out[t * experts + e] = static_cast<T>(value + softmax * loss.slope);
    }
    __syncwarp();  // the next token overwrites what lanes read of each other
  }
}

// The same with a token in registers. Contributions of choices are moved from the lane of the
// choice to the lane of the expert through shared memory.
template <typename T, int N>
__global__ void __launch_bounds__(kMaxWarps* kWarp, kMinBlocks<N>)
    route_backward_lanes_kernel(Incoming<float> grads, const T* __restrict__ logits,
                                const int* __restrict__ ids, const bool* __restrict__ mask,
                                const int* __restrict__ counts, T* __restrict__ out, int64_t tokens,
                                int parts, RouterCall routing, float scale) {
  __shared__ float of_choices[kMaxWarps][kWarp * N];
  __shared__ int count[kWarp * N + 1];
  const int experts = routing.experts, top_k = routing.top_k;
  const Mode mode = routing.mode;
  const bool sigmoid_mode = is_sigmoid(mode);
  float* of_choice = of_choices[threadIdx.y];
  add_counts(counts, parts, experts, count);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t t = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; t < tokens;
       t += stride) {
    const T* from = logits + t * experts;
    const LaneToken<N> token(from, experts, sigmoid_mode);
    const TokenGrads<float> loss(grads, token, mask == nullptr || mask[t], count[experts], routing);
    float inner = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int e = LaneToken<N>::expert(i);
      of_choice[e] = 0;
      // A token that does not count may be NaN.
      if (!loss.counted || e >= experts) continue;
      inner += loss.unit * static_cast<float>(count[e]) * token.probability(i, sigmoid_mode);
    }
    inner = warp_sum(inner);
    const int* chosen = ids + t * top_k;
    const float* own = grads.scores + t * top_k;
    const auto logit_of = [&](int k) { return static_cast<float>(from[chosen[k]]); };
    const Chosen<float> all(mode, top_k, logit_of);
    float chosen_inner = 0;
    for (int k = threadIdx.x; k < top_k; k += kWarp) {
      chosen_inner += own[k] * scale * all.score(mode, token, logit_of(k));
    }
    chosen_inner = warp_sum(chosen_inner);
    __syncwarp();
    for (int k = threadIdx.x; k < top_k; k += kWarp) {
      of_choice[chosen[k]] =
          grad_of_choice(mode, all, token, logit_of(k), own[k] * scale, chosen_inner);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int e = LaneToken<N>::expert(i);
      if (e >= experts) continue;
      const float share = token.share[i];
      const float centred = loss.counted ? loss.unit * static_cast<float>(count[e]) - inner : 0;
      float value = (sigmoid_mode ? centred / token.sigmoid_sum : share * centred) + of_choice[e];
      if (mode == Mode::kSoftmaxTopk) value -= share * chosen_inner;
      if (sigmoid_mode) value *= share * (1 - share);
      const float softmax = sigmoid_mode ? token.softmax(token.logit[i]) : share;
      out[t * experts + e] = static_cast<T>(value + softmax * loss.slope);
    }
    __syncwarp();  // the next token clears what lanes wrote
  }
}

Tensor topk_router_backward(Tensor grad_scores, Tensor grad_balancing, Tensor grad_z, Tensor logits,
                            Tensor ids, std::optional<Tensor> token_mask, std::string mode,
                            double scale, std::string balance) {
  check_router_backward(grad_scores, grad_balancing, grad_z, logits, ids);
  const int64_t tokens = logits.size(0), experts = logits.size(1), top_k = ids.size(1);
  check_mask(token_mask, tokens);
  for (const Tensor* tensor : {&grad_scores, &grad_balancing, &grad_z, &ids}) {
    check_same_device(*tensor, "every input", logits);
  }
  if (token_mask.has_value()) check_same_device(*token_mask, "token_mask", logits);
  const int64_t choices = counted_choices(balance, top_k);
  const RouterCall routing{mode_of(mode),
                           static_cast<int>(experts),
                           static_cast<int>(top_k),
                           1,
                           1,
                           static_cast<int>(choices)};
  const int64_t count_bytes = (experts + 1) * static_cast<int64_t>(sizeof(int));
  UNIMOE_CHECK(count_bytes <= kSharedBytes, "num_experts (", experts, ") must be less than ",
               kSharedBytes / static_cast<int64_t>(sizeof(int)));
  Tensor out = empty({tokens, experts}, logits.scalar_type(), logits);
  const int64_t parts = std::max<int64_t>(
      1, std::min(kCountBlocks, ceil_div<int64_t>(tokens * choices, kCountThreads * kCountBatch)));
  Tensor counts = empty({parts, experts + 1}, ScalarType::Int, logits);
  LaunchShape by_choice{dim3(static_cast<unsigned>(parts)), dim3(kCountThreads)};
  by_choice.shared_bytes = count_bytes;
  launch(count_kernel, by_choice, logits, const_data<int>(ids), mask_data(token_mask),
         mutable_data<int>(counts), tokens, top_k, choices, experts);
  dispatch_floating(logits.scalar_type(), "logits", [&](auto element) {
    using T = decltype(element);
    using S = Accumulator<T>;
    const Incoming<S> grads{const_data<S>(grad_scores), const_data<S>(grad_balancing),
                            const_data<S>(grad_z)};
    const auto route = [&](auto kernel, int64_t warps, int64_t shared_bytes) {
      const int64_t blocks = std::min(kMaxBlocks, ceil_div(tokens, warps));
      LaunchShape shape{dim3(static_cast<unsigned>(blocks)),
                        dim3(kWarp, static_cast<unsigned>(warps))};
      shape.shared_bytes = shared_bytes;
      launch(kernel, shape, logits, grads, const_data<T>(logits), const_data<int>(ids),
             mask_data(token_mask), const_data<int>(counts), mutable_data<T>(out), tokens, parts,
             routing, scale);
    };
    if constexpr (std::is_same_v<S, float>) {
      if (experts <= kMostLaneExperts) {
        return dispatch_lanes(experts, [&](auto n) {
          route(route_backward_lanes_kernel<T, n>, int64_t{kMaxWarps}, 0);
        });
      }
    }
    const int64_t warp_bytes = 3 * experts * static_cast<int64_t>(sizeof(S));
    const int64_t warps = warps_for(warp_bytes, count_bytes, experts);
    route(route_backward_kernel<T, S>, warps, warps * warp_bytes + count_bytes);
  });
  return out;
}

}  // namespace
}  // namespace unimoe

STABLE_TORCH_LIBRARY_IMPL(unimoe, CUDA, m) {
  m.impl("topk_router_backward", TORCH_BOX(&unimoe::topk_router_backward));
}
