"""Processes that share the experts of a served model: the first one serves, the others follow."""

from collections.abc import Mapping
from datetime import timedelta

import torch
import torch.distributed as dist

from unimoe_model.parallel_generation import generate_in_parallel

_PATIENCE = timedelta(seconds=30)


class Ranks:
    """Tells the other ranks when a reply is generated.

    Between replies they wait at the store and not in a collective, which would time out
    where no request comes for a while.

    Args:
        model: after `parallelize_moe`.
    """

    def __init__(self, model):
        self._model = model
        self._store = dist.PrefixStore("serve", dist.distributed_c10d._get_default_store())
        self._number = 0

    @torch.inference_mode()
    def generate(self, **options) -> torch.Tensor:
        """What `model.generate` returns, together with the other ranks; on the first one."""
        names = ("input_ids", "attention_mask")
        inputs: Mapping[str, torch.Tensor] = {name: options.pop(name) for name in names}
        self._tell("reply")
        return generate_in_parallel(self._model, inputs, **options)

    def end(self) -> None:
        """Lets the other ranks return from `take_part`."""
        self._tell("end")

    def _tell(self, what: str) -> None:
        self._store.set(str(self._number), what)
        self._number += 1

    def take_part(self) -> None:
        """Computes rows of the first rank until it ends; on the others."""
        while True:
            key = str(self._number)
            try:
                self._store.wait([key], _PATIENCE)
            except dist.DistStoreError:
                continue
            if self._store.get(key) == b"end":
                return
            self._number += 1
            generate_in_parallel(self._model, None)
