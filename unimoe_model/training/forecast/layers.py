"""Simulates a few decoder layers and repeats their events for identical ones."""

from collections import Counter

import numpy as np
from torch import Tensor, nn

_ENDS = 2
"""Layers at either end that are not repeated, because their neighbours differ."""


class LayerBlocks:
    """Truncates a model to its first decoder layers, and divides their log into blocks per layer.

    The first two and the last two layers represent themselves. Every other layer is represented by
    a kept one with the same modules, shapes, trained weights and attention.

    Args:
        layers: decoder layers of the model, truncated in place.
        whole: whether to keep all layers.

    Attributes:
        kept: number of layers that are kept; all if fewer cannot represent them.
    """

    def __init__(self, layers: nn.ModuleList, whole: bool = False):
        alike = [_signature(layer) for layer in layers]
        self.kept = len(alike) if whole else _fewest(alike)
        # Index of the kept layer that represents each layer.
        self._stands = [alike.index(own, _ENDS) for own in alike[_ENDS:-_ENDS]]
        self._stands = [*range(_ENDS), *self._stands, *range(self.kept - _ENDS, self.kept)]
        if self.kept == len(alike):
            self._stands = list(range(self.kept))
        self._forwards: list[int] = []
        self._backwards: list[int] = []
        del layers[self.kept :]

    def watch(self, layers: nn.ModuleList, events: list) -> None:
        """Records the position in `events` at which each layer's forward and backward begin."""

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
        """Whether layers were removed."""
        return self.kept < len(self._stands)

    @property
    def is_whole(self) -> bool:
        """Whether each kept layer had a forward and a backward."""
        return len(self._forwards) == len(self._backwards) == self.kept

    def repeat(self, change: np.ndarray, made: np.ndarray, is_copy: np.ndarray) -> np.ndarray:
        """Extends the changes of the kept layers to all layers.

        Args:
            change: change of memory per event, `[events, ...]`.
            made: event that allocated the storage of each event, `[events]`.
            is_copy: whether that storage is a copy of weights, `[events]`. Copies kept by autocast
                are released together after the last layer.

        Returns:
            Change of memory per event of all layers, `[more events, ...]`.
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
    """The smallest number of first layers that end like all layers and represent all inner ones."""
    inner = set(alike[_ENDS:-_ENDS])
    for count in range(2 * _ENDS + 1, len(alike)):
        ends_alike = alike[count - _ENDS : count] == alike[-_ENDS:]
        if ends_alike and inner <= set(alike[_ENDS : count - _ENDS]):
            return count
    return len(alike)


def _signature(layer: nn.Module) -> tuple:
    weights = tuple((name, p.shape, p.requires_grad) for name, p in layer.named_parameters())
    return str(layer), weights, getattr(layer, "attention_type", None)
