"""Dispatch of routed rows to the ranks that hold their experts, and combine of the outputs."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from unimoe_kernels import _checks
from unimoe_kernels.distributed.dispatch.all_to_all import Transfer
from unimoe_kernels.distributed.dispatch.chunks import cut_evenly, order_by_chunk
from unimoe_kernels.distributed.dispatch.pieces import Pieces
from unimoe_kernels.distributed.dispatch.traffic import note_counts
from unimoe_kernels.distributed.running.failure import CollectiveError, collective
from unimoe_kernels.ops import expert_sort, permute, unpermute

Answer = Callable[[Tensor, Tensor, Tensor], Tensor]

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Values that must be equal on all ranks of a group in a dispatch.
_AGREED = ("layer", "call", "hidden_size", "dtype", "gradients", "num_chunks", "max_rows")


class DispatchReport(NamedTuple):
    """Statistics of the last dispatch of a layer.

    Attributes:
        rows: number of routed rows that this rank's experts processed.
        chunks: number of chunks in which the rows were received.
        buffer_rows: rows of the largest receive buffer.
        buffer_bytes: size of this buffer; at most two such buffers are in use at a time.
    """

    rows: int
    chunks: int
    buffer_rows: int
    buffer_bytes: int


class ExpertDispatcher:
    """Sends routed rows to the ranks that hold their experts and returns the combined outputs.

    Rank r of the group holds experts `r * E / ranks` to `(r + 1) * E / ranks - 1`. Rows are sorted
    by expert and sent with `all_to_all`; the outputs return in the same order and are weighted and
    summed on the rank of the token. Dispatch is dropless: a rank receives all rows routed to it.

    Before the first transfer of a call the ranks exchange, in one collective and one read by the
    host, their rows per expert and a header that identifies the call and the layer. If ranks are in
    different calls, all of them raise.

    With several chunks, chunk c + 1 and the outputs of chunk c - 1 are transferred while chunk c is
    computed, also in the backward. A chunk is an equal share of the rows that each rank receives,
    in expert order, so that matmuls remain large and most weights are read once.

    Args:
        group: the ranks.
        num_experts: E, the number of experts on all ranks together.
        name: name of the layer in errors.
        num_chunks: number of chunks of a call, at least 1; more chunks mean smaller matmuls.
        max_rows: maximum number of rows that a rank receives at a time (plus one per rank, due to
            rounding), for which the number of chunks is increased. None for no limit. It bounds the
            receive buffers; memory that training saves for the backward grows with all rows
            received.

    Attributes:
        report: `DispatchReport` of the last call, None before it.

    Raises:
        ValueError: If num_experts is not a multiple of the number of ranks, or a number is below 1.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        num_experts: int,
        name: str = "experts",
        num_chunks: int = 1,
        max_rows: int | None = None,
    ) -> None:
        ranks = group.size()
        if num_experts % ranks:
            raise ValueError(
                f"num_experts ({num_experts}) of {name} must be a multiple of the {ranks} ranks of"
                " the expert dimension"
            )
        for what, value in (("num_chunks", num_chunks), ("max_rows", max_rows)):
            if value is not None and value < 1:
                raise ValueError(f"{what} ({value}) must be at least 1")
        self.group = group
        self.num_experts = num_experts
        self.name = name
        self.num_chunks = num_chunks
        self.max_rows = max_rows
        self.report: DispatchReport | None = None
        self._calls = 0

    @torch.compiler.disable
    def __call__(self, answer: Answer, x: Tensor, ids: Tensor, scores: Tensor) -> Tensor:
        """Routes tokens to the experts of all ranks.

        Args:
            answer: computes outputs `[R, D]` from rows `[R, D]`, ids `[R, 1]` among the experts of
                this rank and scores `[R, 1]` of ones.
            x: `[T, D]`; T may differ between ranks and be 0.
            ids: `[T, K]`, int32 or int64, among all experts; E or more is skipped.
            scores: `[T, K]`.

        Returns:
            `[T, D]`, dtype of the outputs of `answer`.

        Raises:
            CollectiveError: If a rank dies, exceeds the timeout, or is in another call.
            NotImplementedError: Under a `torch.func` transform or in forward-mode AD.
        """
        _checks.refuse_transforms(f"dispatch of {self.name}")
        top_k = ids.shape[1]
        sort = expert_sort(ids, self.num_experts)
        counts_RE, needs_gradient = self._agree(x, sort.tokens_per_expert)
        if needs_gradient and not x.requires_grad:
            # Another rank's backward includes this dispatch, so this rank's must include it too.
            x = x.detach().requires_grad_()
        counts_CRE = cut_evenly(counts_RE, self._chunks(counts_RE))
        if len(counts_CRE) > 1:
            sort = order_by_chunk(sort, counts_CRE[:, self.group.rank()])
        rows_ND = permute(x, sort, top_k)
        out_ND = self._exchange(answer, rows_ND, scores.dtype, counts_CRE)
        return unpermute(out_ND, sort, top_k, scores)

    def _agree(self, x: Tensor, tokens_per_expert: Tensor) -> tuple[Tensor, bool]:
        """Returns rows per expert of all ranks, `[ranks, E]`, and whether any x needs gradients."""
        self._calls += 1
        header = [
            zlib.crc32(self.name.encode()),
            self._calls,
            x.shape[1],
            _DTYPES.index(x.dtype),
            int(torch.is_grad_enabled()),
            self.num_chunks,
            self.max_rows or 0,
        ]
        header = torch.tensor([*header, int(x.requires_grad)], device=x.device)
        own = torch.cat([header, tokens_per_expert.long()])
        found = own.new_empty(self.group.size(), own.numel())
        operation = f"dispatch of {self.name}, counts"
        with collective(operation):
            dist.all_gather(list(found.unbind()), own, group=self.group)
        note_counts(own.nbytes * (self.group.size() - 1))
        found = found.cpu()
        own_row = found[self.group.rank()]
        for place, what in enumerate(_AGREED):
            others = (found[:, place] != own_row[place]).nonzero().flatten().tolist()
            if others:
                rank = dist.get_global_rank(self.group, others[0])
                raise CollectiveError(
                    operation,
                    f"rank {rank} has {what} {found[others[0], place]}, this rank"
                    f" {own_row[place]}: they are not in the same call",
                )
        needs_gradient = torch.is_grad_enabled() and bool(found[:, len(_AGREED)].any())
        return found[:, len(_AGREED) + 1 :], needs_gradient

    def _chunks(self, counts_RE: Tensor) -> int:
        if self.max_rows is None:
            return self.num_chunks
        rows_R = counts_RE.view(len(counts_RE), self.group.size(), -1).sum((0, 2))
        return max(self.num_chunks, -(-int(rows_R.max()) // self.max_rows))

    def _exchange(
        self, answer: Answer, rows_ND: Tensor, score_dtype: torch.dtype, counts_CRE: Tensor
    ) -> Tensor:
        """Sends the chunks, runs the experts on them and returns the outputs `[N, D]`."""
        ranks, own = self.group.size(), self.group.rank()
        # [C, source, target, expert of the target]
        counts = counts_CRE.view(len(counts_CRE), ranks, ranks, -1)
        sent_CR, came_CR = counts[:, own].sum(2).tolist(), counts[:, :, own].sum(2).tolist()
        local_ids = [_local_ids(chunk[:, own], rows_ND.device) for chunk in counts]
        self._note(rows_ND, came_CR)
        sizes = [sum(sent) for sent in sent_CR]
        # Rows of no expert are not sent; their outputs are zero.
        questions, answers = (Pieces(sizes, len(rows_ND) - sum(sizes)) for _ in range(2))
        chunks = questions.cut(rows_ND)
        dispatches, combines, outputs = [], [], []

        def dispatch(chunk: int) -> None:
            transfer = Transfer(
                sent_CR[chunk],
                came_CR[chunk],
                self.group,
                f"dispatch of {self.name}",
                grad_room=partial(questions.room, chunk),
            )
            dispatches.append((transfer, transfer.start(chunks[chunk])))

        def finish(started: list[tuple[Transfer, Tensor]]) -> Tensor:
            transfer, received = started.pop(0)
            return transfer.finish(received)

        # One transfer per direction at a time: two would share the link and delay the first.
        dispatch(0)
        for chunk, ids_R1 in enumerate(local_ids):
            rows_RD = finish(dispatches)
            if chunk + 1 < len(local_ids):
                dispatch(chunk + 1)
            ones_R1 = torch.ones(ids_R1.shape, dtype=score_dtype, device=rows_RD.device)
            out_RD = answer(rows_RD, ids_R1, ones_R1)
            if chunk:
                outputs.append(finish(combines))
            transfer = Transfer(
                came_CR[chunk],
                sent_CR[chunk],
                self.group,
                f"combine of {self.name}",
                room=partial(answers.room, chunk),
            )
            combines.append((transfer, transfer.start(out_RD)))
        outputs.append(finish(combines))
        return answers.join(outputs)

    def _note(self, rows_ND: Tensor, came_CR: list[list[int]]) -> None:
        rows_C = [sum(came) for came in came_CR]
        row_bytes = rows_ND.shape[1] * rows_ND.element_size()
        largest = max(rows_C)
        self.report = DispatchReport(sum(rows_C), len(rows_C), largest, largest * row_bytes)


def _local_ids(counts_RL: Tensor, device: torch.device) -> Tensor:
    """Returns the expert of each row, `[R, 1]` int32, for rows ordered by source, then expert."""
    ranks, experts = counts_RL.shape
    ids = torch.arange(experts, dtype=torch.int32, device=counts_RL.device).repeat(ranks)
    return ids.repeat_interleave(counts_RL.flatten()).unsqueeze(1).to(device)
