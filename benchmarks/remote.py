"""Peers that cannot share a process: each runs in its own, controlled through a pipe."""

import atexit
import contextlib
import itertools
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch

from .candidates import UnavailableError
from .memory import give_back_freed_memory, keep_freed_memory
from .problem import Problem, problems_of
from .quantized_peers import QUANTIZED_LAYERS, import_zentorch, route
from .shapes import Case

_START_SECONDS = 120
_workers: dict[str, "_Worker"] = {}


class RemoteLayer:
    """A layer in the process of a peer; only one case of a peer is alive at a time.

    Args:
        peer: name in `_LAYERS`.
        case: the case to run.
        dtype: dtype of weights and inputs.

    Raises:
        UnavailableError: If the peer cannot be imported or does not support this case.
        AssertionError: If its output is wrong.
    """

    def __init__(self, peer: str, case: Case, dtype: torch.dtype) -> None:
        if peer not in _workers:
            _workers[peer] = _Worker(peer)
        self._worker = _workers[peer]
        self._worker.ask(("prepare", case, dtype))

    def time_one_call(self) -> float:
        """Returns the time of one call in seconds, measured in the other process."""
        return self._worker.ask(("run",))


def forget_cases() -> None:
    """Makes the processes of all peers free the memory of their last case."""
    for worker in _workers.values():
        with contextlib.suppress(UnavailableError):
            worker.ask(("forget",))


def stop_workers() -> None:
    """Ends the processes of all peers, which frees their memory."""
    while _workers:
        _workers.popitem()[1].stop()


class _Worker:
    def __init__(self, peer: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        # Spinning threads would occupy the cores while other providers are timed.
        previous = os.environ.get("OMP_WAIT_POLICY")
        os.environ["OMP_WAIT_POLICY"] = "passive"
        try:
            self._process = context.Process(
                target=_serve, args=(peer, theirs, torch.get_num_threads()), daemon=True
            )
            self._process.start()
        finally:
            os.environ.pop("OMP_WAIT_POLICY")
            if previous is not None:
                os.environ["OMP_WAIT_POLICY"] = previous
        atexit.register(self._process.kill)
        self._dead = ""

    def stop(self) -> None:
        atexit.unregister(self._process.kill)
        self._process.kill()
        self._process.join()

    def _signal(self, name: str) -> None:
        """Stops the process between calls: threads of a peer may spin for longer than OpenMP's."""
        if hasattr(signal, name):  # not on Windows
            os.kill(self._process.pid, getattr(signal, name))

    def ask(self, question: tuple) -> float | None:
        if self._dead:
            raise UnavailableError(self._dead)
        try:
            self._signal("SIGCONT")
            self._pipe.send(question)
            if not self._pipe.poll(_START_SECONDS):
                self._dead = f"no answer within {_START_SECONDS} s"
                raise UnavailableError(self._dead)
            kind, value = self._pipe.recv()
            self._signal("SIGSTOP")
        except (EOFError, OSError) as error:
            self._dead = f"its process ended: {error}"
            raise UnavailableError(self._dead) from error
        if kind == "unavailable":
            raise UnavailableError(value)
        if kind == "wrong":
            raise AssertionError(value)
        return value


def _serve(peer: str, pipe: Connection, threads: int) -> None:
    torch.set_num_threads(threads)
    keep_freed_memory()
    runs = itertools.repeat(None)
    while True:
        try:
            question = pipe.recv()
        except EOFError:
            return
        try:
            if question[0] in ("prepare", "forget"):
                runs = run = problems = None
                give_back_freed_memory()
            if question[0] == "forget":
                pipe.send(("ready", None))
                continue
            if question[0] == "prepare":
                problems = problems_of(question[1], torch.device("cpu"), question[2])
                runs = itertools.cycle([_LAYERS[peer](problem) for problem in problems])
                pipe.send(("ready", None))
                continue
            run = next(runs)
            begin = time.perf_counter()
            run()
            pipe.send(("seconds", time.perf_counter() - begin))
        except UnavailableError as error:
            pipe.send(("unavailable", str(error)))
        except AssertionError as error:
            pipe.send(("wrong", str(error)))
        except Exception as error:
            # A peer may fail in any way: report the reason and continue the run.
            reason = traceback.format_exception_only(error)[-1].strip()
            pipe.send(("unavailable", reason.splitlines()[0]))


def _zentorch_layer(problem: Problem) -> Callable[[], None]:
    import_zentorch()
    experts = problem.moe.experts
    # Its first call repacks bfloat16 weights in place.
    gate_up, down = experts.gate_up_proj.detach().clone(), experts.down_proj.detach().clone()
    x_TD = problem.x[0].contiguous()
    y_TD = torch.empty_like(x_TD)
    fused_moe = torch.ops.zentorch.zentorch_fused_moe

    def run() -> None:
        scores_TK, ids_TK = route(problem, x_TD)
        fused_moe(y_TD, x_TD, gate_up, down, None, None, scores_TK, ids_TK.int(), False, "silu")

    with torch.no_grad():
        run()
        problem.check_output("zentorch", y_TD[None])
    return torch.no_grad()(run)


_LAYERS = {"zentorch": _zentorch_layer, **QUANTIZED_LAYERS}
