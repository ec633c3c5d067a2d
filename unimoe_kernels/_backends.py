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
        name: of the operator.
        overloads: by name: `"default"`, `"reference"` and, where it has kernels, `"triton"`.
        recorded: by name of an overload, what calls it and has autograd record that; empty without
            a gradient formula.
        plain: the same in operations that every transform of torch goes through.
        parts: operators that this one is composed of.
        fused: whether `"triton"` is more than its parts one after the other.
        public: whether it has a function of its own, and is listed.
        kernels: compiled operators by which its default overload runs on a GPU.
        proven: whether these come before Triton where nothing asks for a backend.
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
        """Returns the name of an overload, or for lack of it the reference."""
        return overload if overload in self.overloads else "reference"

    def backends_on(self, device_type: str) -> tuple[str, ...]:
        """Returns the backends that run on a device type, the automatic choice first."""
        return self.available.get(device_type, ("reference",))

    def backend_on(self, device_type: str) -> str:
        """Returns the backend that a call on a device type takes."""
        available = self.backends_on(device_type)
        return _forced if _forced in available else available[0]

    def is_compiled_for(self, device_type: str) -> bool:
        """Returns whether the extension has a kernel for it."""
        return _is_compiled(self.name, device_type)

    def runs_kernels_on(self, device_type: str) -> bool:
        """Returns whether the extension has all of `kernels`, of which there are some."""
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
        num_outputs: How many results `call` returns where autograd records it: the others are for
            the formula alone. 0 for all.
        public: Whether the operator has a public function.
        kernels: Compiled operators by which `native` runs on a GPU, where the extension has them.
        proven: Whether these come before Triton where nothing asks for a backend.
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
    """Returns what calls an overload with a gradient formula, past torch.library's boundary.

    That boundary goes from the dispatcher to Python and back and fills in arguments: with it, a
    training step of a layer with four tokens took 1.3 times as long.
    """

    def forward(ctx: object, *args: object) -> object:
        with torch._C._AutoDispatchBelowAutograd():
            output = chosen(*args)
        setup_context(ctx, args, output)
        return output if num_outputs == 0 else output[:num_outputs]

    name = chosen.name().replace("::", "_").replace(".", "_")
    methods = {"forward": staticmethod(forward), "backward": staticmethod(formula)}
    function = type(name, (torch.autograd.Function,), methods)
    # What `Function.apply` does besides is for transforms of torch.func, which do not come here.
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

    To be called after the last `declare`: a composed operator may come before its parts.
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
    # On a CPU Triton kernels run only in its interpreter, which is a tool for tests.
    return device == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def has_triton(op: str, tensor: Tensor) -> bool:
    """Returns whether the Triton kernels of `op` run on the device of `tensor`."""
    return "triton" in _operators[op].backends_on(tensor.device.type)


def operators(public: bool | None = None) -> list[Operator]:
    """Returns all operators in order of their names, or those that are public or are not."""
    found = [one for one in _operators.values() if public is None or one.public == public]
    return sorted(found, key=lambda operator: operator.name)


def forced() -> str | None:
    """Returns the backend that `use_backend` or `UNIMOE_BACKEND` asks for."""
    return _forced


def backend_of(op: str, tensor: Tensor) -> str:
    """Returns the backend that a call of `op` on the device of `tensor` takes."""
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

    Unlike the overload alone it gives the right derivatives of any order, in any mode.

    Args:
        overload: `"default"`, `"triton"` or, also for lack of it, `"reference"`.
        op: Name of the operator.
        *args: Its arguments.
    """
    operator = _operators[op]
    if _checks.transformed() or (not operator.recorded and needs_gradient(*args)):
        return _in_plain_torch(operator, *args)
    return _dispatch(operator, operator.existing(overload), args)


def _dispatch(operator: Operator, overload: str, args: tuple[object, ...]) -> object:
    """Calls an overload as directly as the mode allows.

    Compiled and traced code is to see the operator itself, whose gradient formula torch.library
    knows.
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
    # The operator itself computes in the dtypes that it is given.
    with torch.autocast(device_type, enabled=False):
        return operator.plain(*args)


def is_captured() -> bool:
    """Returns whether `torch.compile` or `torch.jit.trace` writes down what is called."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def is_recorded(*args: object) -> bool:
    """Returns whether what a gradient formula does with these is itself to be differentiated."""
    return needs_gradient(*args) or _checks.transformed()


def needs_gradient(*args: object) -> bool:
    """Returns whether autograd records what is done with any of the tensors among `args`."""
    if not torch.is_grad_enabled():
        return False
    if torch.compiler.is_compiling():  # which does not know the function below
        return any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)
    return torch._C._any_requires_grad(*args)


def available_backends(op: str, device: str | torch.device | None = None) -> tuple[str, ...]:
    """Lists the backends that an operator has on a device, the automatic choice first.

    Args:
        op: Name of an operator, such as `"permute"`.
        device: A device or device type. Default: CUDA where torch sees a GPU, else the CPU.

    Raises:
        ValueError: If there is no such operator.
    """
    names = [operator.name for operator in operators(public=True)]
    if op not in names:
        raise ValueError(f"op ({op!r}) must be one of {', '.join(names)}")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return _operators[op].backends_on(torch.device(device).type)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Makes every operator that has backend `name` on the device of its input use it.

    Operators without that backend there keep their automatic choice. The choice is fixed in the
    forward: a backward that runs after the block still uses `name`. It holds for the whole
    process, not for one thread. The environment variable `UNIMOE_BACKEND` sets the same for a
    whole run; empty counts as unset.

    Example:
        >>> moe = MoE(hidden_size=16, intermediate_size=32, num_experts=4, top_k=2)
        >>> with use_backend("reference"):  # in plain torch
        ...     y = moe(torch.ones(3, 16))
        >>> y.shape
        torch.Size([3, 16])

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
    if any(name in order for one in operators(public=True) for order in one.available.values()):
        return
    missing = "the package triton is not installed"
    if name != "triton":
        missing = _extension.error or f"{EXTENSION} is compiled without it"
    raise RuntimeError(f"{source} ({name!r}) must be a backend of this installation: {missing}")
