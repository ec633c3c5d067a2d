"""Simulates a few decoder layers and repeats what they log for the others, which are alike."""

from collections import Counter

import numpy as np
from torch import Tensor, nn

_ENDS = 2
"""Layers at either end that are not repeated: what comes before or after differs there."""


class LayerBlocks:
    """Cuts a model to its first decoder layers, and a log of them into a block for each.

    The first two and the last two layers stand for themselves. Each layer between is like a kept
    one between: of the same modules, shapes, trained weights and attention.

    Attributes:
        kept: how many layers are kept; all of them if no fewer stand for all.

    Args:
        layers: of the model, cut in place.
        whole: whether to keep all.
    """

    def __init__(self, layers: nn.ModuleList, whole: bool = False):
        alike = [_signature(layer) for layer in layers]
        self.kept = len(alike) if whole else _fewest(alike)
        # Which kept layer each of all stands for.
        self._stands = [alike.index(own, _ENDS) for own in alike[_ENDS:-_ENDS]]
        self._stands = [*range(_ENDS), *self._stands, *range(self.kept - _ENDS, self.kept)]
        if self.kept == len(alike):
            self._stands = list(range(self.kept))
        self._forwards: list[int] = []
        self._backwards: list[int] = []
        del layers[self.kept :]

    def watch(self, layers: nn.ModuleList, events: list) -> None:
        """Notes where in a growing list of events each layer's forward and backward begin."""

        def enter(*_) -> None:
            if len(self._forwards) < self.kept:
                self._forwards.append(len(events))

        def leave(_, __, output) -> None:
            output = output if isinstance(output, Tensor) else output[0]
            if output.requires_grad:
                output.register_hook(lambda _: self._backwards.append(len(events)))

        for layer in layers:
            layer.register_forward_pre_hook(enter)
            layer.register_forward_hook(leave)

    @property
    def is_cut(self) -> bool:
        """Whether some layers were left out."""
        return self.kept < len(self._stands)

    @property
    def is_whole(self) -> bool:
        """Whether each kept layer had a forward and a backward."""
        return len(self._forwards) == len(self._backwards) == self.kept

    def repeat(self, change: np.ndarray, made: np.ndarray, is_copy: np.ndarray) -> np.ndarray:
        """What all layers change, of what the kept ones do.

        Args:
            change: by event, `[events, ...]`.
            made: event in which the storage of each event was made.
            is_copy: whether that storage is a copy of weights. Those that autocast keeps are
                released all together behind the last layer.
        """
        starts = [*self._forwards, *self._backwards, len(change)]
        block = np.searchsorted(starts, np.arange(len(change)), side="right") - 1
        last = self.kept - 1
        between = Counter(self._stands)
        change = change.copy()
        for layer in range(self.kept):
            change[(block == last) & is_copy & (block[made] == layer)] *= between[layer]
        order = [-1, *self._stands[:-1], last]
        # The backward goes from the last layer to the first.
        backward = {layer: 2 * self.kept - 1 - layer for layer in range(self.kept)}
        order += [backward[layer] for layer in (last, *reversed(self._stands[:-1]))]
        return np.concatenate([change[block == own] for own in order])


def _fewest(alike: list) -> int:
    """The fewest first layers that end as all do, with a layer between for each kind between."""
    inner = set(alike[_ENDS:-_ENDS])
    for count in range(2 * _ENDS + 1, len(alike)):
        ends_alike = alike[count - _ENDS : count] == alike[-_ENDS:]
        if ends_alike and inner <= set(alike[_ENDS : count - _ENDS]):
            return count
    return len(alike)


def _signature(layer: nn.Module) -> tuple:
    weights = tuple((name, p.shape, p.requires_grad) for name, p in layer.named_parameters())
    return str(layer), weights, getattr(layer, "attention_type", None)
