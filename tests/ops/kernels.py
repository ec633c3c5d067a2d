"""Every `triton.jit` function of the package, what calls what, and what launchers launch."""

import importlib
import inspect
from typing import NamedTuple

import cases
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

PACKAGE_FOLDER = cases.OPS_FOLDER.parent
JIT = (JITFunction, InterpretedFunction)


class Launch(NamedTuple):
    """A launch of a kernel: arguments by name, options such as num_warps, and through what."""

    kernel: object
    arguments: dict
    options: dict
    modules: frozenset


def module_name(path):
    return ".".join(path.relative_to(PACKAGE_FOLDER.parent).with_suffix("").parts)


def modules_of_kernels():
    """Names of the modules of operators that launch kernels."""
    paths = [*cases.OPS_FOLDER.glob("*/kernel*.py"), *cases.OPS_FOLDER.glob("*/fused*.py")]
    return sorted(map(module_name, paths))


def functions():
    """All `triton.jit` functions by module and name, kernels and what they call."""
    found = {}
    for path in sorted(PACKAGE_FOLDER.rglob("*.py")):
        if "triton.jit" not in path.read_text(encoding="utf-8"):
            continue
        name = module_name(path)
        for function in vars(importlib.import_module(name)).values():
            if isinstance(function, JIT) and function.fn.__module__ == name:
                found[f"{name}.{function.fn.__name__}"] = function
    return found


def names_used(function):
    """Names that a function and all that it calls use, and these functions."""
    names, reached, waiting = set(), {}, [function]
    while waiting:
        current = waiting.pop()
        if id(current) in reached:
            continue
        reached[id(current)] = current
        names.update(current.fn.__code__.co_names)
        known = (current.fn.__globals__.get(name) for name in current.fn.__code__.co_names)
        waiting += [value for value in known if isinstance(value, JIT)]
    return names, list(reached.values())


def kernels():
    """The functions that no other calls: launched, or of no use."""
    every = functions().values()
    called = {id(callee) for one in every for callee in names_used(one)[1] if callee is not one}
    return [one for one in every if id(one) not in called]


def short_name(kernel):
    return kernel.fn.__name__.removesuffix("_kernel")


def multiplies(kernel):
    """Whether matrix units work in a kernel."""
    return "dot" in names_used(kernel)[0]


def takes_descriptors(kernel):
    """Whether a kernel can read an operand through a tensor descriptor."""
    return any(name.endswith("_FORM") for name in inspect.signature(kernel.fn).parameters)


def record_launches(run):
    """Runs a function and lists what it launches, instead of launching it."""
    launches = []

    def record(kernel, *args, grid, warmup, **kwargs):
        names = list(inspect.signature(kernel.fn).parameters)
        options = {name: kwargs.pop(name) for name in list(kwargs) if name not in names}
        arguments = dict(zip(names, args, strict=False)) | kwargs
        launches.append(Launch(kernel, arguments, options, modules_on_stack()))

    originals = [(one, one.run) for one in JIT]
    for one in JIT:
        one.run = record
    try:
        run()
    finally:
        for one, original in originals:
            one.run = original
    return launches


def modules_on_stack():
    """Names of the modules whose functions are running."""
    names, frame = set(), inspect.currentframe()
    while frame is not None:
        names.add(frame.f_globals.get("__name__"))
        frame = frame.f_back
    return frozenset(names)
