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

Calls that no overload supports run in plain torch operations, which torch differentiates by itself:
any call under a transform of `torch.func` or in forward-mode AD, and a backward operator without a
gradient formula whose result is differentiated again (`create_graph=True`).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from unimoe_kernels import _checks, _extension

BACKENDS = ("reference", "cpp", "cuda", "triton")
EXTENSION = "unimoe_kernels._C"
_OVERLOAD_OF = {"reference": "reference", "cpp": "default", "cuda": "default", "triton": "triton"}

_library = torch.library.Library("unimoe", "FRAGMENT")
_forced: str | None = None


@dataclasses.dataclass(frozen=True)
class Operator:
    """An operator of the `unimoe` namespace, as `declare` registered it.

    Attributes:
        name: name of the operator.
        overloads: overloads by name: `"default"`, `"reference"` and, if it has Triton kernels,
            `"triton"`.
        recorded: by overload name, a function that calls the overload and records it with
            autograd; empty without a gradient formula.
        plain: the same computation in operations that all of torch's transforms support.
        parts: names of the operators that this one is composed of.
        fused: whether `"triton"` fuses its parts rather than running them one after the other.
        public: whether the operator has a public function and is listed.
        kernels: compiled operators that its default overload calls on a GPU.
        proven: whether these are preferred to Triton when no backend is forced.
        available: by device type, the backends that run there, the automatic choice first; filled
            by `find_kernels`.
    """

    name: str
    overloads: dict[str, torch._ops.OpOverload]
    recorded: dict[str, Callable]
    plain: Callable
    parts: tuple[str, ...]
    fused: bool
    public: bool
    kernels: tuple[str, ...] = ()
    proven: bool = False
    available: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def existing(self, overload: str) -> str:
        """Returns `overload` if the operator has it, else `"reference"`."""
        return overload if overload in self.overloads else "reference"

    def backends_on(self, device_type: str) -> tuple[str, ...]:
        """Returns the backends that run on a device type, the automatic choice first."""
        return self.available.get(device_type, ("reference",))

    def backend_on(self, device_type: str) -> str:
        """Returns the backend that a call on a device type uses."""
        available = self.backends_on(device_type)
        return _forced if _forced in available else available[0]

    def is_compiled_for(self, device_type: str) -> bool:
        """Returns whether the extension has a kernel of this operator for a device type."""
        return _is_compiled(self.name, device_type)

    def runs_kernels_on(self, device_type: str) -> bool:
        """Returns whether `kernels` is not empty and the extension has all of them."""
        return bool(self.kernels) and all(_is_compiled(one, device_type) for one in self.kernels)


def _is_compiled(op: str, device_type: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"unimoe::{op}", device_type.upper())


_operators: dict[str, Operator] = {}


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
    num_outputs: int = 0,
    public: bool = True,
    kernels: tuple[str, ...] = (),
    proven: bool = False,
) -> None:
    """Registers an operator and the overloads of its backends.

    Args:
        op: Name of the operator.
        schema: Arguments and results in the dispatcher's schema language, without the name.
        reference: Plain torch implementation for any device.
        fake: Allocates the results from the shapes and dtypes of the arguments alone.
        triton: Implementation that launches Triton kernels.
        native: Implementation of the default overload on devices for which `csrc` has no kernel.
            Default: `reference`.
        plain: The same computation in torch operations that autograd, forward mode and vmap
            support, or in operators called by `run`. Default: `reference`.
        parts: Operators that this one is composed of. It counts as having a backend when one of
            them has it.
        fused: Whether `triton` fuses its parts rather than running them one after the other.
        setup_context: As in `torch.library.register_autograd`.
        backward: As in `torch.library.register_autograd`, with the overload name as an additional
            first argument. Without it, differentiating the operator itself raises
            NotImplementedError.
        num_outputs: Number of results that `call` returns when autograd records it; the remaining
            ones serve the gradient formula only. 0 for all.
        public: Whether the operator has a public function.
        kernels: Compiled operators that `native` calls on a GPU, if the extension has them.
        proven: Whether these are preferred to Triton when no backend is forced.
    """
    implementations = {"default": native or reference, "reference": reference}
    if triton is not None:
        implementations["triton"] = triton
    overloads, recorded = {}, {}
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
        overloads[overload] = chosen = getattr(getattr(torch.ops.unimoe, op), overload)
        if backward is not None:
            formula = partial(backward, overload)
            recorded[overload] = _recorded(chosen, setup_context, formula, num_outputs)
    _operators[op] = Operator(
        op, overloads, recorded, plain or reference, parts, fused, public, kernels, proven
    )


def _recorded(
    chosen: torch._ops.OpOverload, setup_context: Callable, formula: Callable, num_outputs: int
) -> Callable:
    """Returns a function that calls an overload under autograd, bypassing torch.library's wrapper.

    The wrapper goes from the dispatcher to Python and back and fills in default arguments: with it,
    a training step of a layer with four tokens takes 1.3 times as long.
    """

    def forward(ctx: object, *args: object) -> object:
        with torch._C._AutoDispatchBelowAutograd():
            output = chosen(*args)
        setup_context(ctx, args, output)
        return output if num_outputs == 0 else output[:num_outputs]

    name = chosen.name().replace("::", "_").replace(".", "_")
    methods = {"forward": staticmethod(forward), "backward": staticmethod(formula)}
    function = type(name, (torch.autograd.Function,), methods)
    # `Function.apply` adds only support for torch.func transforms, which never reach this point.
    return super(torch.autograd.Function, function).apply


def _refuse(op: str, ctx: object, *grads: Tensor) -> None:
    raise NotImplementedError(f"unimoe::{op} is not differentiable")


def declare_compiled(op: str, schema: str, *, fake: Callable | None = None) -> None:
    """Registers an operator without gradients that only `csrc` implements."""
    _library.define(op + schema)
    if fake is not None:
        torch.library.register_fake(f"unimoe::{op}", fake, lib=_library)


def find_kernels() -> None:
    """Looks up the backends of every operator, and reads `UNIMOE_BACKEND`.

    Call it after the last `declare`: a composed operator may be declared before its parts.
    """
    global _forced
    for operator in _operators.values():
        operator.available.update({device: _order(operator, device) for device in ("cpu", "cuda")})
    if forced := os.environ.get("UNIMOE_BACKEND"):  # empty counts as unset
        _require("UNIMOE_BACKEND", forced)
        _forced = forced


def _order(operator: Operator, device: str) -> tuple[str, ...]:
    parts = [operator, *(_operators[part] for part in operator.parts)]
    native = "cuda" if device == "cuda" else "cpp"
    runs_kernels = operator.runs_kernels_on(device)
    compiled = runs_kernels or any(part.is_compiled_for(device) for part in parts)
    native = native if compiled else None
    triton = "triton" if _triton_runs_on(device) and "triton" in operator.overloads else None
    if device != "cuda":
        order = (native, "reference", triton)
    elif operator.is_compiled_for(device) or (runs_kernels and operator.proven):
        order = (native, triton, "reference")
    else:
        order = (triton, native, "reference")
    return tuple(backend for backend in order if backend is not None)


def _triton_runs_on(device: str) -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    # On a CPU, Triton kernels run only in Triton's interpreter, which is for tests.
    return device == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def has_triton(op: str, tensor: Tensor) -> bool:
    """Returns whether the Triton kernels of `op` run on the device of `tensor`."""
    return "triton" in _operators[op].backends_on(tensor.device.type)


def operators(public: bool | None = None) -> list[Operator]:
    """Returns operators sorted by name: all of them, or only public or only private ones."""
    found = [one for one in _operators.values() if public is None or one.public == public]
    return sorted(found, key=lambda operator: operator.name)


def forced() -> str | None:
    """Returns the backend forced by `use_backend` or `UNIMOE_BACKEND`, or None."""
    return _forced


def backend_of(op: str, tensor: Tensor) -> str:
    """Returns the backend that a call of `op` uses on the device of `tensor`."""
    return _operators[op].backend_on(tensor.device.type)


def call(op: str, *args: object) -> object:
    """Calls the overload of `op` for the device of its first argument, a tensor."""
    operator = _operators[op]
    if _checks.transformed():
        return _in_plain_torch(operator, *args)
    backend = operator.backend_on("cpu" if args[0].is_cpu else args[0].device.type)
    return _dispatch(operator, _OVERLOAD_OF[backend], args)


def run(overload: str, op: str, *args: object) -> object:
    """Calls an overload of `op`, for gradient formulas and operators composed of others.

    Unlike calling the overload directly, it supports derivatives of any order in any mode.

    Args:
        overload: `"default"`, `"triton"` or `"reference"`; if the operator lacks it, the reference
            is called.
        op: Name of the operator.
        *args: Its arguments.
    """
    operator = _operators[op]
    if _checks.transformed() or (not operator.recorded and needs_gradient(*args)):
        return _in_plain_torch(operator, *args)
    return _dispatch(operator, operator.existing(overload), args)


def _dispatch(operator: Operator, overload: str, args: tuple[object, ...]) -> object:
    """Calls an overload with as little dispatcher overhead as the mode allows.

    Under `torch.compile` and tracing the operator itself is called, so that the graph holds it with
    the gradient formula registered in torch.library.
    """
    chosen = operator.overloads[overload]
    if is_captured():
        return chosen(*args)
    if not needs_gradient(*args):
        with torch._C._AutoDispatchBelowAutograd():
            return chosen(*args)
    recorded = operator.recorded.get(overload, chosen)
    return recorded(*args)


def _in_plain_torch(operator: Operator, *args: object) -> object:
    device_type = next(arg.device.type for arg in args if isinstance(arg, Tensor))
    if not torch.amp.is_autocast_available(device_type):
        return operator.plain(*args)
    # The operator computes in the dtypes of its arguments, whatever autocast is set to.
    with torch.autocast(device_type, enabled=False):
        return operator.plain(*args)


def is_captured() -> bool:
    """Returns whether `torch.compile` or `torch.jit.trace` is capturing the call."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def is_recorded(*args: object) -> bool:
    """Returns whether operations on `args` in a gradient formula must be differentiable again."""
    return needs_gradient(*args) or _checks.transformed()


def needs_gradient(*args: object) -> bool:
    """Returns whether autograd records operations on any of the tensors in `args`."""
    if not torch.is_grad_enabled():
        return False
    if torch.compiler.is_compiling():  # Dynamo cannot trace the function below
        return any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)
    return torch._C._any_requires_grad(*args)


def available_backends(op: str, device: str | torch.device | None = None) -> tuple[str, ...]:
    """Lists the backends that an operator has on a device, the automatic choice first.

    Args:
        op: Name of an operator, such as `"permute"`.
        device: A device or device type. Default: CUDA if torch sees a GPU, else the CPU.

    Returns:
        Some of `"reference"`, `"cpp"`, `"cuda"` and `"triton"`.

    Raises:
        ValueError: If `op` is not a public operator.
    """
    names = [operator.name for operator in operators(public=True)]
    if op not in names:
        raise ValueError(f"op ({op!r}) must be one of {', '.join(names)}")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return _operators[op].backends_on(torch.device(device).type)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces a backend for all operators called inside the block.

    Operators without that backend on the device of their input keep their automatic choice. The
    choice is fixed in the forward: a backward that runs after the block still uses `name`. It
    applies to the whole process, not only to the current thread. The environment variable
    `UNIMOE_BACKEND` does the same for a whole run; an empty value counts as unset.

    Example:
        >>> moe = MoE(hidden_size=16, intermediate_size=32, num_experts=4, top_k=2)
        >>> with use_backend("reference"):  # plain torch
        ...     y = moe(torch.ones(3, 16))
        >>> y.shape
        torch.Size([3, 16])

    Args:
        name: `"reference"`, `"cpp"`, `"cuda"` or `"triton"`.

    Raises:
        ValueError: If `name` is not a backend.
        RuntimeError: If no operator has that backend in this installation.
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
    if any(name in order for one in operators(public=True) for order in one.available.values()):
        return
    missing = "the package triton is not installed"
    if name != "triton":
        missing = _extension.error or f"{EXTENSION} is compiled without it"
    raise RuntimeError(f"{source} ({name!r}) must be a backend of this installation: {missing}")
