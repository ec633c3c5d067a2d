// Choice of experts, their scores, and the losses on the choice: a warp a token.
//
// The forward is two launches. Blocks walk over tokens and write their counts and sums; the second
// kernel adds these up in the order of the blocks, so that the losses are the same every run. The
// only atomics are integer, on counts.
#include "router_token.cuh"

namespace unimoe {
namespace {

// Blocks of the forward: enough to fill a device, few enough to add up quickly.
constexpr int kMaxParts = 256;
constexpr int kReduceLanes = 32;  // blocks whose sums are added at a time

__host__ __device__ int64_t round_up(int64_t bytes) { return (bytes + 15) / 16 * 16; }

// The shared memory of a warp, and behind that of all warps the counts of the block.
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

// chosen_counts, counted_counts, probabilities [parts, experts]; squares, tokens [parts]. Block 0
// also sets `ticket` to 0 for the kernel that adds them up.
template <typename T, typename S>
__global__ void route_kernel(const T* __restrict__ logits, const S* __restrict__ bias,
                             const bool* __restrict__ mask, S* __restrict__ scores,
                             int* __restrict__ ids, int* __restrict__ chosen_counts,
                             int* __restrict__ counted_counts, S* __restrict__ probabilities,
                             double* __restrict__ squares, int* __restrict__ tokens_counted,
                             int* __restrict__ ticket, int64_t tokens, RouterCall routing,
                             S scale) {
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
  __shared__ double warp_squares[kMaxWarps];
  __shared__ int warp_tokens[kMaxWarps];

  const int thread = threadIdx.y * kWarp + threadIdx.x;
  for (int e = thread; e < 2 * experts; e += warps * kWarp) block_chosen[e] = 0;
  for (int e = threadIdx.x; e < experts; e += kWarp) total[e] = 0;
  if (blockIdx.x == 0 && thread == 0) *ticket = 0;
  __syncthreads();

  double square = 0;
  int counted_tokens = 0;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * warps;
  for (int64_t t = static_cast<int64_t>(blockIdx.x) * warps + threadIdx.y; t < tokens;
       t += stride) {
    WarpToken<S> token;
    token.read(logits + t * experts, experts, logit, sigmoid);
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
    const Chosen<S> all(routing.mode, top_k, chosen, logit, sigmoid);
    for (int k = threadIdx.x; k < top_k; k += kWarp) {
      const int e = chosen[k];
      ids[t * top_k + k] = e;
      scores[t * top_k + k] =
          all.score(routing.mode, token, logit[e], sigmoid_mode ? sigmoid[e] : S(0)) * scale;
      atomicAdd(&block_chosen[e], 1);
      if (counts && k < routing.choices) atomicAdd(&block_counted[e], 1);
    }
    if (counts) {
      for (int e = threadIdx.x; e < experts; e += kWarp) {
        total[e] += sigmoid_mode ? sigmoid[e] / token.sigmoid_sum : token.softmax(logit[e]);
      }
      const double z = static_cast<double>(token.logsumexp());
      square += z * z;
      ++counted_tokens;
    }
    __syncwarp();  // the next token overwrites what lanes read of each other
  }
  if (threadIdx.x == 0) {
    warp_squares[threadIdx.y] = square;
    warp_tokens[threadIdx.y] = counted_tokens;
  }
  __syncthreads();
  for (int e = thread; e < experts; e += warps * kWarp) {
    S sum = 0;
    for (int w = 0; w < warps; ++w) {
      sum += reinterpret_cast<const S*>(shared + w * layout.bytes + layout.total)[e];
    }
    const int64_t at = static_cast<int64_t>(blockIdx.x) * experts + e;
    probabilities[at] = sum;
    chosen_counts[at] = block_chosen[e];
    counted_counts[at] = block_counted[e];
  }
  if (thread == 0) {
    for (int w = 1; w < warps; ++w) {
      warp_squares[0] += warp_squares[w];
      warp_tokens[0] += warp_tokens[w];
    }
    squares[blockIdx.x] = warp_squares[0];
    tokens_counted[blockIdx.x] = warp_tokens[0];
  }
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
  // A lane alone would wait for memory hundreds of times, one after the other.
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
  tokens = tokens < 1 ? 1 : tokens;  // it divides
  *load_balancing_loss = static_cast<S>(experts * balancing / (tokens * choices * tokens));
  *router_z_loss = static_cast<S>(square / tokens);
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
    const int64_t warp_bytes = Layout<S>(routing).bytes;
    const int64_t common = 2 * experts * static_cast<int64_t>(sizeof(int));
    const int64_t warps = warps_for(warp_bytes, common, experts);
    const int64_t parts =
        std::max<int64_t>(1, std::min<int64_t>(kMaxParts, ceil_div(tokens, warps)));
    const int64_t blocks = ceil_div<int64_t>(experts, kWarp);
    Tensor chosen = empty({parts, experts}, ScalarType::Int, logits);
    Tensor counted = empty({parts, experts}, ScalarType::Int, logits);
    Tensor probabilities = empty({parts, experts}, dtype, logits);
    Tensor squares = empty({parts}, ScalarType::Double, logits);
    Tensor tokens_counted = empty({parts}, ScalarType::Int, logits);
    Tensor shares = empty({blocks}, ScalarType::Double, logits);
    Tensor ticket = empty({1}, ScalarType::Int, logits);
    LaunchShape shape{dim3(static_cast<unsigned>(parts)),
                      dim3(kWarp, static_cast<unsigned>(warps))};
    shape.shared_bytes = warps * warp_bytes + common;
    launch(route_kernel<T, S>, shape, logits, const_data<T>(logits),
           bias.has_value() ? const_data<S>(*bias) : nullptr, mask_data(token_mask),
           mutable_data<S>(scores), mutable_data<int>(ids), mutable_data<int>(chosen),
           mutable_data<int>(counted), mutable_data<S>(probabilities),
           mutable_data<double>(squares), mutable_data<int>(tokens_counted),
           mutable_data<int>(ticket), tokens, routing, scale);
    launch(reduce_kernel<S>, {dim3(static_cast<unsigned>(blocks)), dim3(kWarp, kReduceLanes)},
           logits, const_data<int>(chosen), const_data<int>(counted), const_data<S>(probabilities),
           const_data<double>(squares), const_data<int>(tokens_counted),
           mutable_data<int>(tokens_per_expert), mutable_data<double>(shares),
           mutable_data<int>(ticket), mutable_data<S>(load_balancing_loss),
           mutable_data<S>(router_z_loss), parts, experts, choices);
  });
  return {scores, ids, tokens_per_expert, load_balancing_loss, router_z_loss};
}

}  // namespace
}  // namespace unimoe

STABLE_TORCH_LIBRARY_IMPL(unimoe, CUDA, m) {
  m.impl("topk_router", TORCH_BOX(&unimoe::topk_router));
}
