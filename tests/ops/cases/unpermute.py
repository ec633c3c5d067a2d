"""Examples of `unpermute`, with scores and without."""

from cases import Case, at_every_shape, empty, ints, scores_of
from unimoe_kernels import expert_sort, unpermute


def unpermuted(ids, num_experts, rows, scores=None):
    scores = None if scores is None else scores_of(scores)
    return unpermute(rows, expert_sort(ids, num_experts), ids.shape[1], scores)


CASES = [
    Case("weighted", unpermuted, lambda s: ((s.N, s.D), (s.T, s.K))),
    Case("summed", unpermuted, lambda s: ((s.N, s.D),)),
]


def launches(everything):
    yield from at_every_shape(launch, everything)


def launch(shape):
    from unimoe_kernels.ops.unpermute import kernel

    order, offsets, top_k = ints(shape.rows), ints(shape.experts + 1), shape.top_k
    rows = empty(shape.rows, shape.width, dtype=shape.dtype)
    scores = empty(shape.tokens, top_k, dtype=shape.score_dtype)
    grad = empty(shape.tokens, shape.width, dtype=shape.dtype)
    kernel.unpermute(rows, order, offsets, scores, top_k)
    kernel.unpermute(rows, order, offsets, None, top_k)
    kernel.unpermute_backward(grad, rows, order, offsets, scores, top_k)
