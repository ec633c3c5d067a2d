"""Processes that share the experts of a served model: the first one serves, the others follow."""

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
"""How often a rank that was asked to end waits for the first one, which ends its reply before."""


class Ranks:
    """Tells the other ranks when a reply is generated.

    Between replies they wait at the store and not in a collective, which would time out
    where no request comes for a while.

    Args:
        model: after `parallelize_moe`.

    Attributes:
        failure: why the ranks are out of step, after which nothing can be generated; else None.
        on_failure: is called then.
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
        """What `model.generate` returns, together with the other ranks; on the first one.

        An error between two forwards, such as one of sampling, leaves the ranks in step. After one
        in a forward, `failure` is set.

        Raises:
            RuntimeError: If the ranks are out of step, or `end` was called.
        """
        if self.failure is not None:
            raise RuntimeError(f"processes are out of step: {self.failure}") from self.failure
        names = ("input_ids", "attention_mask")
        inputs: Mapping[str, torch.Tensor] = {name: options.pop(name) for name in names}
        has_begun = False

        # The others join the first forward: an error before it concerns this rank alone.
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
        """Goes on as a rank does that is done, until the others are as well."""
        device = self._model.device
        ids = torch.zeros((1, 1), dtype=torch.long, device=device)
        try:
            while True:
                # What `generate` does with `synced_gpus` before each forward.
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
        """Lets the other ranks return from `take_part`."""
        self._tell("end")

    def _tell(self, what: str) -> None:
        with self._lock:
            if self._is_over:
                raise RuntimeError("the server is ending")
            self._is_over = what == "end"
            self._store.set(str(self._number), what)
            self._number += 1

    def take_part(self) -> None:
        """Computes rows of the first rank until it ends; on the others.

        SIGINT and SIGTERM, which launchers send to all ranks, wait for the first rank to end.

        Raises:
            KeyboardInterrupt: If a signal came and the first rank does not end.
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
