// Selection of experts, their scores, and the auxiliary losses: one warp per token, in registers if
// the token fits and else in shared memory.
//
// The forward is two launches. Blocks iterate over tokens and write their counts and sums; the
// second kernel adds these up. Atomics are used only on integer counts.
#include "router_parts.cuh"
#include "router_shared.cuh"
#include "topk_router_lanes.cuh"

namespace unimoe {
namespace {

// Blocks of the forward: enough to fill a device, few enough to add up quickly.
constexpr int64_t kMaxParts = 512;

__host__ __device__ int64_t round_up(int64_t bytes) { return (bytes + 15) / 16 * 16; }

// The shared memory of a warp; that of all warps is followed by the counts of the block.
template <typename S>
struct Layout {
  int64_t sigmoid, order, total, chosen, rank, bytes;

  __host__ __device__ explicit Layout(const RouterCall& routing) {
    const int64_t values = round_up(routing.experts * sizeof(S));
    const bool grouped = routing.num_groups != routing.top_groups;
    sigmoid = values;
    order = sigmoid + (is_sigmoid(routing.mode) ? values : 0);
    total = order + values;
    chosen = total + values;
    rank = chosen + round_up(routing.top_k * sizeof(int));
    bytes = rank + (grouped ? round_up(routing.num_groups * sizeof(S)) +
                                  round_up(routing.num_groups * sizeof(int))
                            : 0);
  }
};

// Gives the experts outside of a token's groups the order of -infinity.
template <typename S>
__device__ void close_groups(const RouterCall& routing, bool biased,
                             typename Order<S>::Integer* orders, typename Order<S>::Integer* ranks,
                             int* used) {
  using Integer = typename Order<S>::Integer;
  const int size = routing.experts / routing.num_groups;
  // DeepSeek-V2 ranks groups by their best expert; V3, which has the bias, by the best two.
  const bool two = biased && size > 1;
  for (int g = 0; g < routing.num_groups; ++g) {
    const int first = g * size, last = first + size;
    const Candidate<Integer> best = warp_best(lane_best(orders, first, last, -1));
    S rank = Order<S>::value_of(best.order);
    if (two) {
      const Candidate<Integer> next = warp_best(lane_best(orders, first, last, best.id));
      rank += Order<S>::value_of(next.order);
    }
    if (threadIdx.x == 0) ranks[g] = Order<S>::of(rank);
  }
  __syncwarp();
  for (int g = threadIdx.x; g < routing.num_groups; g += kWarp) {
    int better = 0;
    for (int h = 0; h < routing.num_groups; ++h) {
      better += ranks[h] > ranks[g] || (ranks[h] == ranks[g] && h < g);
    }
    used[g] = better < routing.top_groups;
  }
  __syncwarp();
  const Integer closed = Order<S>::of(-std::numeric_limits<S>::infinity());
  for (int e = threadIdx.x; e < routing.experts; e += kWarp) {
    if (!used[e / size]) orders[e] = closed;
  }
}

template <typename T, typename S>
__global__ void route_kernel(const T* __restrict__ logits, const S* __restrict__ bias,
                             const bool* __restrict__ mask, S* __restrict__ scores,
                             int* __restrict__ ids, Parts<S> parts, int64_t tokens,
                             RouterCall routing, S scale) {
  using Integer = typename Order<S>::Integer;
  extern __shared__ __align__(16) unsigned char shared[];
  const Layout<S> layout(routing);
  const int experts = routing.experts, top_k = routing.top_k, warps = blockDim.y;
  const bool sigmoid_mode = is_sigmoid(routing.mode);
  unsigned char* own = shared + threadIdx.y * layout.bytes;
  S* logit = reinterpret_cast<S*>(own);
  S* sigmoid = sigmoid_mode ? reinterpret_cast<S*>(own + layout.sigmoid) : nullptr;
  Integer* orders = reinterpret_cast<Integer*>(own + layout.order);
  S* total = reinterpret_cast<S*>(own + layout.total);
  int* chosen = reinterpret_cast<int*>(own + layout.chosen);
  int* block_chosen = reinterpret_cast<int*>(shared + warps * layout.bytes);
  int* block_counted = block_chosen + experts;

  const int thread = threadIdx.y * kWarp + threadIdx.x;
  for (int e = thread; e < 2 * experts; e += warps * kWarp) block_chosen[e] = 0;
  for (int e = threadIdx.x; e < experts; e += kWarp) total[e] = 0;
  __syncthreads();

  WarpCounts own_counts;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * warps;
  for (int64_t t = static_cast<int64_t>(blockIdx.x) * warps + threadIdx.y; t < tokens;
       t += stride) {
    const TokenSums<S> token = read_token(logits + t * experts, experts, logit, sigmoid);
    for (int e = threadIdx.x; e < experts; e += kWarp) {
      S choice = sigmoid_mode ? sigmoid[e] : logit[e];
      if (bias != nullptr) choice = (sigmoid_mode ? choice : token.softmax(choice)) + bias[e];
      orders[e] = Order<S>::of(choice);
    }
    if (routing.num_groups != routing.top_groups) {
      Integer* ranks = reinterpret_cast<Integer*>(own + layout.rank);
      close_groups<S>(routing, bias != nullptr, orders, ranks,
                      reinterpret_cast<int*>(own + layout.rank +
                                             round_up(routing.num_groups * sizeof(Integer))));
    }
    Candidate<Integer> mine = lane_best(orders, 0, experts, -1);
    for (int k = 0; k < top_k; ++k) {
      const Candidate<Integer> best = warp_best(mine);
      if (threadIdx.x == 0) chosen[k] = best.id;
      if (best.id % kWarp == threadIdx.x) {
        orders[best.id] = std::numeric_limits<Integer>::lowest();
        mine = lane_best(orders, 0, experts, best.id);
      }
    }
    __syncwarp();
    const bool counts = mask == nullptr || mask[t];
    const Chosen<S> all(routing.mode, top_k, [&](int k) { return logit[chosen[k]]; });
    for (int k = threadIdx.x; k < top_k; k += kWarp) {
      const int e = chosen[k];
      ids[t * top_k + k] = e;
      scores[t * top_k + k] = all.score(routing.mode, token, logit[e]) * scale;
      atomicAdd(&block_chosen[e], 1);
      if (counts && k < routing.choices) atomicAdd(&block_counted[e], 1);
    }
    if (counts) {
      for (int e = threadIdx.x; e < experts; e += kWarp) {
        total[e] += sigmoid_mode ? sigmoid[e] / token.sigmoid_sum : token.softmax(logit[e]);
      }
      own_counts.add(token);
    }
    __syncwarp();  // the next token overwrites what lanes read of each other
  }
  write_part(parts, experts, block_chosen, block_counted, own_counts, [&](int e, int warp) {
    return reinterpret_cast<const S*>(shared + warp * layout.bytes + layout.total)[e];
  });
}

using Routed = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Routed topk_router(Tensor logits, std::optional<Tensor> correction_bias,
                   std::optional<Tensor> token_mask, int64_t top_k, std::string mode,
                   int64_t num_groups, int64_t top_groups, double scale, std::string balance) {
  check_router(logits, correction_bias, top_k, num_groups, top_groups);
  const int64_t tokens = logits.size(0), experts = logits.size(1);
  check_mask(token_mask, tokens);
  if (token_mask.has_value()) check_same_device(*token_mask, "token_mask", logits);
  const bool is_double = logits.scalar_type() == ScalarType::Double;
  const ScalarType dtype = is_double ? ScalarType::Double : ScalarType::Float;
  std::optional<Tensor> bias;
  if (correction_bias.has_value()) {
    check_same_device(*correction_bias, "correction_bias", logits);
    bias = torch::stable::to(*correction_bias, dtype);
  }
  const int64_t choices = counted_choices(balance, top_k);
  const RouterCall routing{mode_of(mode),
                           static_cast<int>(experts),
                           static_cast<int>(top_k),
                           static_cast<int>(num_groups),
                           static_cast<int>(top_groups),
                           static_cast<int>(choices)};

  Tensor scores = empty({tokens, top_k}, dtype, logits);
  Tensor ids = empty({tokens, top_k}, ScalarType::Int, logits);
  Tensor tokens_per_expert = empty({experts}, ScalarType::Int, logits);
  Tensor load_balancing_loss = empty({}, dtype, logits);
  Tensor router_z_loss = empty({}, dtype, logits);

  dispatch_floating(logits.scalar_type(), "logits", [&](auto element) {
    using T = decltype(element);
    using S = Accumulator<T>;
    const bool in_registers = fits_lanes(routing) && std::is_same_v<S, float>;
    const int64_t warp_bytes = Layout<S>(routing).bytes;
    const int64_t common = 2 * experts * static_cast<int64_t>(sizeof(int));
    const int64_t warps = in_registers ? kMaxWarps : warps_for(warp_bytes, common, experts);
    const int64_t blocks =
        std::max<int64_t>(1, std::min<int64_t>(kMaxParts, ceil_div(tokens, warps)));
    Tensor chosen = empty({blocks, experts}, ScalarType::Int, logits);
    Tensor counted = empty({blocks, experts}, ScalarType::Int, logits);
    Tensor probabilities = empty({blocks, experts}, dtype, logits);
    Tensor squares = empty({blocks}, ScalarType::Double, logits);
    Tensor counted_tokens = empty({blocks}, ScalarType::Int, logits);
    Tensor ticket = empty({1}, ScalarType::Int, logits);
    const Parts<S> parts{mutable_data<int>(chosen),         mutable_data<int>(counted),
                         mutable_data<S>(probabilities),    mutable_data<double>(squares),
                         mutable_data<int>(counted_tokens), mutable_data<int>(ticket)};
    LaunchShape shape{dim3(static_cast<unsigned>(blocks)),
                      dim3(kWarp, static_cast<unsigned>(warps))};
    const auto route = [&](auto kernel, int64_t shared_bytes) {
      shape.shared_bytes = shared_bytes;
      launch(kernel, shape, logits, const_data<T>(logits),
             bias.has_value() ? const_data<S>(*bias) : nullptr, mask_data(token_mask),
             mutable_data<S>(scores), mutable_data<int>(ids), parts, tokens, routing, scale);
    };
    if constexpr (std::is_same_v<S, float>) {
      if (in_registers) {
        dispatch_lanes(experts, [&](auto n) {
          route(route_lanes_kernel<T, n>,
                common + warps * top_k * static_cast<int64_t>(sizeof(int)));
        });
      }
    }
    if (!in_registers) route(route_kernel<T, S>, common + warps * warp_bytes);
    const int64_t reduce_blocks = ceil_div<int64_t>(experts, kWarp);
    Tensor shares = empty({reduce_blocks}, ScalarType::Double, logits);
    launch(reduce_kernel<S>,
           {dim3(static_cast<unsigned>(reduce_blocks)), dim3(kWarp, kReduceLanes)}, logits,
           const_data<int>(chosen), const_data<int>(counted), const_data<S>(probabilities),
           const_data<double>(squares), const_data<int>(counted_tokens),
           mutable_data<int>(tokens_per_expert), mutable_data<double>(shares),
           mutable_data<int>(ticket), mutable_data<S>(load_balancing_loss),
           mutable_data<S>(router_z_loss), blocks, experts, choices);
  });
  return {scores, ids, tokens_per_expert, load_balancing_loss, router_z_loss};
}

}  // namespace
}  // namespace unimoe

STABLE_TORCH_LIBRARY_IMPL(unimoe, CUDA, m) {
  m.impl("topk_router", TORCH_BOX(&unimoe::topk_router));
}
