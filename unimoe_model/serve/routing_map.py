"""The routing of one reply: rows per expert, by layer and modality."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from unimoe_model.evaluation.routing import recorded_routing
from unimoe_model.modality import MODALITIES, modality_ids_of

REPLY = "reply"


@dataclass(frozen=True)
class RoutingMap:
    """Counts of routed rows.

    Attributes:
        layers: indices of the decoder layers with experts.
        experts: names of the experts.
        tokens: number of tokens by modality that occurs; `"reply"` counts the generated ones.
        taken: routed rows `[layers][experts]` by modality; a token has one row for each of its
            top-k experts.
    """

    layers: list[int]
    experts: list[str]
    tokens: dict[str, int]
    taken: dict[str, list[list[int]]]

    def share(self, modality: str, layer: int) -> list[float]:
        """Returns each expert's share of a modality's routed rows, in the layer of this index."""
        row = self.taken[modality][layer]
        return [count / max(sum(row), 1) for count in row]


class RoutingRecord:
    """The data collected by `routing_recorded`."""

    def __init__(self, model):
        self._model = model
        self.ids: list[torch.Tensor] = []
        self.chosen: dict[int, list[torch.Tensor]] = {}

    def map(self) -> RoutingMap | None:
        """Returns the counts; None if nothing was routed, as in a dense model."""
        if not self.chosen or not self.ids:
            return None
        config = self._model.config
        experts, layers = config.num_experts, list(self.chosen)
        prompt = modality_ids_of(self.ids[0], config.media_token_ids).flatten()
        names = [*MODALITIES, REPLY]
        generated = torch.full((len(self.ids) - 1,), len(MODALITIES), device=prompt.device)
        of = torch.cat([prompt, generated]).cpu()
        tokens = torch.bincount(of, minlength=len(names)).tolist()
        taken = {name: [] for name, count in zip(names, tokens, strict=True) if count}
        for layer in layers:
            routed = torch.cat(self.chosen[layer]).long().cpu()
            for name in taken:
                ids = routed[of[: len(routed)] == names.index(name)].flatten()
                # Ids beyond the experts stand for null experts and dropped choices.
                counts = torch.bincount(ids[ids < experts], minlength=experts)
                taken[name].append(counts.tolist())
        origins = config.expert_origins or [str(expert) for expert in range(experts)]
        seen = {name: tokens[names.index(name)] for name in taken}
        return RoutingMap(layers, list(origins), seen, taken)


@contextmanager
def routing_recorded(model) -> Iterator[RoutingRecord]:
    """Records the routing while one reply is generated.

    The first forward computes the new part of the prompt, each further one a token of the reply.
    """
    record = RoutingRecord(model)

    def before(module, args, kwargs):
        ids = kwargs.get("input_ids", args[0] if args else None)
        record.ids.append(ids.detach())

    handle = model.register_forward_pre_hook(before, with_kwargs=True)
    try:
        with recorded_routing(model, on_device=True) as chosen:
            record.chosen = chosen
            yield record
    finally:
        handle.remove()
