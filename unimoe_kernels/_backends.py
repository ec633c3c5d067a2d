"""Declares operators and picks the implementation that a call runs.

An operator has one schema and up to three overloads of it in the `unimoe` namespace:

=============  ==========================  ====================================================
backend        overload                    filled by
=============  ==========================  ====================================================
`cpp`/`cuda`   `unimoe::<op>` (default)    `csrc/`, by device; the reference until it is there
`triton`       `unimoe::<op>.triton`       `ops/<op>/kernel.py`
`reference`    `unimoe::<op>.reference`    `ops/<op>/reference.py`, any device
=============  ==========================  ====================================================

The overload is chosen when the public function is called. Its gradient formula calls backward
operators of the same backend, so forward and backward of one call never mix.

What no overload can do is done in plain torch, through which torch differentiates by itself: any
call under a transform of `torch.func` or in forward mode, and a backward operator without a formula
of its own whose result is differentiated again (`create_graph=True`).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from unimoe_kernels import _checks, _extension

BACKENDS = ("reference", "cpp", "cuda", "triton")
_OVERLOAD_OF = {"reference": "reference", "cpp": "default", "cuda": "default", "triton": "triton"}

_EXTENSION = "unimoe_kernels._C"

_library = torch.library.Library("unimoe", "FRAGMENT")
_overloads: dict[str, dict[str, torch._ops.OpOverload]] = {}
# op -> device type -> backends that run there, the automatic choice first
_available: dict[str, dict[str, tuple[str, ...]]] = {}
_plain: dict[str, Callable] = {}
_differentiable: set[str] = set()
_parts: dict[str, tuple[str, ...]] = {}
_fused: dict[str, bool] = {}
_public: list[str] = []
_forced: str | None = None


class BackendChoice(NamedTuple):
    """The backend that an operator takes on a device, and why."""

    op: str
    device: str
    backend: str
    reason: str


def declare(
    op: str,
    schema: str,
    *,
    reference: Callable,
    fake: Callable,
    triton: Callable | None = None,
    native: Callable | None = None,
    plain: Callable | None = None,
    parts: tuple[str, ...] = (),
    fused: bool = False,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
    public: bool = True,
) -> None:
    """Registers an operator and the overloads of its backends.

    Args:
        op: Name of the operator.
        schema: Arguments and results in the dispatcher's schema language, without the name.
        reference: Plain torch implementation for any device.
        fake: Allocates the results from the shapes and dtypes of the arguments alone.
        triton: Implementation that launches Triton kernels.
        native: What the default overload runs on a device for which `csrc` has no kernel. Default:
            `reference`.
        plain: The same in operations of torch's that autograd, forward mode and vmap go through,
            or in operators by `run`. Default: `reference`.
        parts: Operators that this one is composed of. It counts as having a backend when one of
            them has it.
        fused: Whether `triton` is more than its parts one after the other.
        setup_context: As in `torch.library.register_autograd`.
        backward: As there, with the name of the overload put first. Without it a gradient through
            the operator itself is refused.
        public: Whether the operator is listed by `report`.
    """
    implementations = {"default": native or reference, "reference": reference}
    if triton is not None:
        implementations["triton"] = triton
    _overloads[op] = {}
    for overload, implementation in implementations.items():
        name = op if overload == "default" else f"{op}.{overload}"
        _library.define(name + schema)
        _library.impl(name, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"unimoe::{name}", fake, lib=_library)
        torch.library.register_autograd(
            f"unimoe::{name}",
            partial(_refuse, op) if backward is None else partial(backward, overload),
            setup_context=setup_context,
            lib=_library,
        )
        _overloads[op][overload] = getattr(getattr(torch.ops.unimoe, op), overload)
    _plain[op] = plain or reference
    if backward is not None:
        _differentiable.add(op)
    _parts[op] = parts
    _fused[op] = fused
    if public:
        _public.append(op)


def _refuse(op: str, ctx: object, *grads: Tensor) -> None:
    raise NotImplementedError(f"unimoe::{op} is not differentiable")


def declare_compiled(op: str, schema: str) -> None:
    """Registers an operator without gradients that only `csrc` implements."""
    _library.define(op + schema)


def find_kernels() -> None:
    """Looks up the backends of every operator, and reads `UNIMOE_BACKEND`.

    To be called after the last `declare`: a composed operator may come before its parts.
    """
    global _forced
    for op in _overloads:
        _available[op] = {"cpu": _order(op, "cpu"), "cuda": _order(op, "cuda")}
    if forced := os.environ.get("UNIMOE_BACKEND"):  # empty counts as unset
        _require("UNIMOE_BACKEND", forced)
        _forced = forced


def _order(op: str, device: str) -> tuple[str, ...]:
    native = "cuda" if device == "cuda" else "cpp"
    native = native if any(_is_compiled(part, device) for part in (op, *_parts[op])) else None
    triton = "triton" if _triton_runs_on(device) and "triton" in _overloads[op] else None
    if device != "cuda":
        order = (native, "reference", triton)
    elif _is_compiled(op, device):
        order = (native, triton, "reference")
    else:
        # Matmuls have Triton kernels and no CUDA ones: with CUDA parts alone they would run in
        # plain torch.
        order = (triton, native, "reference")
    return tuple(backend for backend in order if backend is not None)


def _is_compiled(op: str, device: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"unimoe::{op}", device.upper())


def _triton_runs_on(device: str) -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    # On a CPU Triton kernels run only in its interpreter, which is a tool for tests.
    return device == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def overload(op: str, name: str) -> torch._ops.OpOverload:
    """Returns overload `"default"`, `"triton"` or, also for lack of it, `"reference"` of `op`."""
    overloads = _overloads[op]
    return overloads.get(name, overloads["reference"])


def backend_of(op: str, tensor: Tensor) -> str:
    """Returns the backend that a call of `op` on the device of `tensor` takes."""
    available = _available[op].get(tensor.device.type, ("reference",))
    return _forced if _forced in available else available[0]


def select(op: str, tensor: Tensor) -> torch._ops.OpOverload:
    """Returns the overload of `op` that a call on the device of `tensor` takes."""
    return _overloads[op][_OVERLOAD_OF[backend_of(op, tensor)]]


def call(op: str, *args: object) -> object:
    """Calls the overload of `op` that `select` picks by its first argument, a tensor."""
    if _checks.transformed():
        return _in_plain_torch(op, *args)
    return _dispatch(select(op, args[0]), *args)


def run(name: str, op: str, *args: object) -> object:
    """Calls overload `name` of `op`, for gradient formulas and operators composed of others.

    Unlike the overload alone it gives the right derivatives of any order, in any mode.
    """
    if _checks.transformed() or (op not in _differentiable and needs_gradient(*args)):
        return _in_plain_torch(op, *args)
    return _dispatch(overload(op, name), *args)


def _dispatch(chosen: torch._ops.OpOverload, *args: object) -> object:
    """Calls an overload; where no gradient is needed the formula for it is stepped over.

    The formula is Python, and with cold caches costs a call some 50 us, in which 2 MB of weights
    could be read.
    """
    if torch.compiler.is_compiling() or needs_gradient(*args):
        return chosen(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return chosen(*args)


def _in_plain_torch(op: str, *args: object) -> object:
    device_type = next(arg.device.type for arg in args if isinstance(arg, Tensor))
    if not torch.amp.is_autocast_available(device_type):
        return _plain[op](*args)
    # The operator itself computes in the dtypes that it is given.
    with torch.autocast(device_type, enabled=False):
        return _plain[op](*args)


def is_recorded(*args: object) -> bool:
    """Returns whether what a gradient formula does with these is itself to be differentiated."""
    return needs_gradient(*args) or _checks.transformed()


def needs_gradient(*args: object) -> bool:
    """Returns whether autograd records what is done with any of the tensors among `args`."""
    return torch.is_grad_enabled() and any(
        isinstance(arg, Tensor) and arg.requires_grad for arg in args
    )


def available_backends(op: str, device: str | torch.device | None = None) -> tuple[str, ...]:
    """Lists the backends that an operator has on a device, the automatic choice first.

    Args:
        op: Name of an operator, such as `"permute"`.
        device: A device or device type. Default: CUDA where torch sees a GPU, else the CPU.

    Raises:
        ValueError: If there is no such operator.
    """
    if op not in _public:
        raise ValueError(f"op ({op!r}) must be one of {', '.join(_public)}")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return _available[op].get(torch.device(device).type, ("reference",))


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Makes every operator that has backend `name` on the device of its input use it.

    Operators without that backend there keep their automatic choice. The choice is fixed in the
    forward: a backward that runs after the block still uses `name`. It holds for the whole
    process, not for one thread. The environment variable `UNIMOE_BACKEND` sets the same for a
    whole run; empty counts as unset.

    Example: `with use_backend("reference"): y = moe(x)` runs the layer in plain torch.

    Args:
        name: `"reference"`, `"cpp"`, `"cuda"` or `"triton"`.

    Raises:
        ValueError: If `name` is not a backend.
        RuntimeError: If no operator has that backend here.
    """
    global _forced
    _require("name", name)
    previous, _forced = _forced, name
    try:
        yield
    finally:
        _forced = previous


def _require(source: str, name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{source} ({name!r}) must be one of {', '.join(BACKENDS)}")
    if any(name in order for op in _public for order in _available[op].values()):
        return
    missing = "the package triton is not installed"
    if name != "triton":
        missing = _extension.error or f"{_EXTENSION} is compiled without it"
    raise RuntimeError(f"{source} ({name!r}) must be a backend of this installation: {missing}")


def report() -> list[BackendChoice]:
    """Lists for every operator and device type the backend that a call takes, with the reason."""
    return [
        BackendChoice(op, device, *_explain(op, device, order))
        for op in sorted(_public)
        for device, order in _available[op].items()
    ]


def _explain(op: str, device: str, order: tuple[str, ...]) -> tuple[str, str]:
    if _forced in order:
        return _forced, "asked for by use_backend or UNIMOE_BACKEND"
    backend = order[0]
    own = _fused[op] if backend == "triton" else _is_compiled(op, device)
    if _parts[op] and not own:
        having = [part for part in _parts[op] if backend in _available[part][device]]
        if backend == "reference":
            return backend, "none of its parts has a kernel here"
        return backend, f"composed; {backend} runs {', '.join(having)}"
    if backend == "triton":
        return backend, "no CUDA kernel in the extension"
    if backend == "reference":
        wanted = "C++" if device == "cpu" else "CUDA or Triton"
        return backend, f"plain torch: there is no {wanted} kernel"
    return backend, f"compiled into {_EXTENSION}"
