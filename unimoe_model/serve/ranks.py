"""Processes that share the experts of a served model: rank 0 serves, the others follow."""

import threading
from collections.abc import Callable, Mapping
from datetime import timedelta

import torch
import torch.distributed as dist

from unimoe_kernels.distributed import CollectiveError
from unimoe_model.parallel_generation import generate_in_parallel
from unimoe_model.training.stopping import StopRequest

_POLL = timedelta(seconds=1)
_GRACE_POLLS = 20
"""Polls that a rank waits after a signal for the first rank, which finishes its reply before."""


class Ranks:
    """Synchronises the ranks for each reply.

    Between replies, the other ranks wait at the store instead of in a collective, which would time
    out if no request arrives for a while.

    Args:
        model: model after `parallelize_moe`.

    Attributes:
        failure: error that left the ranks out of step, after which nothing can be generated; None
            otherwise.
        on_failure: called when `failure` is set.
    """

    def __init__(self, model):
        self._model = model
        self._store = dist.PrefixStore("serve", dist.distributed_c10d._get_default_store())
        self._number = 0
        self._lock = threading.Lock()
        self._is_over = False
        self._is_inside = False
        self.failure: Exception | None = None
        self.on_failure: Callable[[], None] = lambda: None

    @torch.inference_mode()
    def generate(self, **options) -> torch.Tensor:
        """Generates together with the other ranks; to be called on the first rank.

        An error between two forwards, such as one of sampling, leaves the ranks in step. An error
        within a forward sets `failure`.

        Returns:
            The output of `model.generate`.

        Raises:
            RuntimeError: If the ranks are out of step, or `end` was called.
        """
        if self.failure is not None:
            raise RuntimeError(f"processes are out of step: {self.failure}") from self.failure
        names = ("input_ids", "attention_mask")
        inputs: Mapping[str, torch.Tensor] = {name: options.pop(name) for name in names}
        has_begun = False

        # The others join at the first forward: an error before it affects only this rank.
        def before(module, args):
            nonlocal has_begun
            if not has_begun:
                self._tell("reply")
                has_begun = True
            self._is_inside = True

        def after(module, args, outputs):
            self._is_inside = False

        hooks = (
            self._model.register_forward_pre_hook(before),
            self._model.register_forward_hook(after),
        )
        try:
            return generate_in_parallel(self._model, inputs, **options)
        except Exception as error:
            if isinstance(error, CollectiveError) or self._is_inside:
                self._fail(error)
            elif has_begun:
                self._leave()
            raise
        finally:
            for hook in hooks:
                hook.remove()

    def _leave(self) -> None:
        """Runs forwards like a rank that is done, until the others are done as well."""
        device = self._model.device
        ids = torch.zeros((1, 1), dtype=torch.long, device=device)
        try:
            while True:
                # `generate` with `synced_gpus` does the same before each forward.
                unfinished = torch.zeros((), device=device)
                dist.all_reduce(unfinished)
                if not unfinished:
                    return
                self._model(input_ids=ids, attention_mask=torch.ones_like(ids))
        except Exception as error:
            self._fail(error)
            raise

    def _fail(self, error: Exception) -> None:
        self.failure = error
        self.on_failure()

    def end(self) -> None:
        """Makes the other ranks return from `take_part`."""
        self._tell("end")

    def _tell(self, what: str) -> None:
        with self._lock:
            if self._is_over:
                raise RuntimeError("the server is ending")
            self._is_over = what == "end"
            self._store.set(str(self._number), what)
            self._number += 1

    def take_part(self) -> None:
        """Computes rows of the first rank until it ends; to be called on the other ranks.

        After SIGINT or SIGTERM, which launchers send to all ranks, it waits for the first rank to
        end.

        Raises:
            KeyboardInterrupt: If the first rank does not end in time after a signal.
        """
        polls = 0
        with StopRequest() as stop:
            while True:
                key = str(self._number)
                try:
                    self._store.wait([key], _POLL)
                except dist.DistStoreError:
                    polls += bool(stop.signal)
                    if polls > _GRACE_POLLS:
                        raise KeyboardInterrupt from None
                    continue
                if self._store.get(key) == b"end":
                    return
                self._number += 1
                generate_in_parallel(self._model, None)
