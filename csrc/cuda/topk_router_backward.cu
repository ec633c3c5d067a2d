// Gradient of `topk_router` in the logits: a warp a token, after a count of the choices on which
// the load-balancing loss depends. The only atomics are integer.
#include "router_token.cuh"

namespace unimoe {
namespace {

constexpr int kCountBlocks = 128;
constexpr int kCountThreads = 256;

__global__ void zero_kernel(int* counts, int size) {
  for (int i = threadIdx.x; i < size; i += blockDim.x) counts[i] = 0;
}

// Adds to counts[e] the counted choices of expert e, and to counts[experts] the counted tokens.
__global__ void count_kernel(const int* __restrict__ ids, const bool* __restrict__ mask,
                             int* __restrict__ counts, int64_t tokens, int top_k, int choices,
                             int experts) {
  extern __shared__ int histogram[];
  for (int e = threadIdx.x; e <= experts; e += blockDim.x) histogram[e] = 0;
  __syncthreads();
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t t = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; t < tokens;
       t += stride) {
    if (mask != nullptr && !mask[t]) continue;
    atomicAdd(&histogram[experts], 1);
    for (int k = 0; k < choices; ++k) atomicAdd(&histogram[ids[t * top_k + k]], 1);
  }
  __syncthreads();
  for (int e = threadIdx.x; e <= experts; e += blockDim.x) {
    if (histogram[e] != 0) atomicAdd(&counts[e], histogram[e]);
  }
}

template <typename T, typename S>
__global__ void route_backward_kernel(const S* __restrict__ grad_scores,
                                      const S* __restrict__ grad_balancing,
                                      const S* __restrict__ grad_z, const T* __restrict__ logits,
                                      const int* __restrict__ ids, const bool* __restrict__ mask,
                                      const int* __restrict__ counts, T* __restrict__ out,
                                      int64_t tokens, RouterCall routing, S scale) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (t >= tokens) return;
  extern __shared__ __align__(16) unsigned char shared[];
  const int experts = routing.experts, top_k = routing.top_k;
  const Mode mode = routing.mode;
  const bool sigmoid_mode = is_sigmoid(mode);
  S* logit = reinterpret_cast<S*>(shared) + static_cast<int64_t>(threadIdx.y) * 3 * experts;
  S* grad = logit + experts;
  S* sigmoid = sigmoid_mode ? grad + experts : nullptr;
  WarpToken<S> token;
  token.read(logits + t * experts, experts, logit, sigmoid);

  const bool counted = mask == nullptr || mask[t];
  const S n = static_cast<S>(max(counts[experts], 1));
  const S unit = counted ? *grad_balancing * S(experts) / (n * S(routing.choices)) / n : S(0);
  S inner = 0;
  for (int e = threadIdx.x; e < experts; e += kWarp) {
    const S probability = sigmoid_mode ? sigmoid[e] / token.sigmoid_sum : token.softmax(logit[e]);
    grad[e] = unit * static_cast<S>(counts[e]);
    // A token that does not count may be NaN.
    inner += counted ? grad[e] * probability : S(0);
  }
  inner = warp_sum(inner);
  for (int e = threadIdx.x; e < experts; e += kWarp) {
    const S centred = counted ? grad[e] - inner : S(0);
    grad[e] = sigmoid_mode ? centred / token.sigmoid_sum : token.softmax(logit[e]) * centred;
  }
  __syncwarp();
  const int* chosen = ids + t * top_k;
  const S* own = grad_scores + t * top_k;
  const Chosen<S> all(mode, top_k, chosen, logit, sigmoid);
  S chosen_inner = 0;
  for (int k = threadIdx.x; k < top_k; k += kWarp) {
    const int e = chosen[k];
    const S score = all.score(mode, token, logit[e], sigmoid_mode ? sigmoid[e] : S(0));
    chosen_inner += own[k] * scale * score;
  }
  chosen_inner = warp_sum(chosen_inner);
  // An expert is chosen once by a token, so that no two lanes add to the same one.
  for (int k = threadIdx.x; k < top_k; k += kWarp) {
    const int e = chosen[k];
    const S given = own[k] * scale;
    if (mode == Mode::kSigmoid) {
      grad[e] += given;
    } else if (mode == Mode::kSigmoidRenorm) {
      grad[e] += (given - chosen_inner) / all.sum;
    } else if (mode == Mode::kSoftmaxTopk) {
      grad[e] += token.softmax(logit[e]) * given;
    } else {
      grad[e] += all.score(mode, token, logit[e], S(0)) * (given - chosen_inner);
    }
  }
  __syncwarp();
  const S slope = counted ? S(2) * token.logsumexp() * (*grad_z / n) : S(0);
  for (int e = threadIdx.x; e < experts; e += kWarp) {
    const S softmax = token.softmax(logit[e]);
    S value = grad[e];
    if (mode == Mode::kSoftmaxTopk) value -= softmax * chosen_inner;
    if (sigmoid_mode) value *= sigmoid[e] * (S(1) - sigmoid[e]);
    out[t * experts + e] = static_cast<T>(value + softmax * slope);
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
  Tensor counts = empty({experts + 1}, ScalarType::Int, logits);
  launch(zero_kernel, {dim3(1), dim3(kCountThreads)}, logits, mutable_data<int>(counts),
         experts + 1);
  LaunchShape by_token{dim3(static_cast<unsigned>(std::min<int64_t>(
                           kCountBlocks, ceil_div<int64_t>(tokens, kCountThreads)))),
                       dim3(kCountThreads)};
  by_token.shared_bytes = count_bytes;
  launch(count_kernel, by_token, logits, const_data<int>(ids), mask_data(token_mask),
         mutable_data<int>(counts), tokens, top_k, choices, experts);
  dispatch_floating(logits.scalar_type(), "logits", [&](auto element) {
    using T = decltype(element);
    using S = Accumulator<T>;
    const int64_t warp_bytes = 3 * experts * static_cast<int64_t>(sizeof(S));
    const int64_t warps = warps_for(warp_bytes, 0, experts);
    LaunchShape shape{dim3(static_cast<unsigned>(ceil_div(tokens, warps))),
                      dim3(kWarp, static_cast<unsigned>(warps))};
    shape.shared_bytes = warps * warp_bytes;
    launch(route_backward_kernel<T, S>, shape, logits, const_data<S>(grad_scores),
           const_data<S>(grad_balancing), const_data<S>(grad_z), const_data<T>(logits),
           const_data<int>(ids), mask_data(token_mask), const_data<int>(counts),
           mutable_data<T>(out), tokens, routing, scale);
  });
  return out;
}

}  // namespace
}  // namespace unimoe

STABLE_TORCH_LIBRARY_IMPL(unimoe, CUDA, m) {
  m.impl("topk_router_backward", TORCH_BOX(&unimoe::topk_router_backward));
}
