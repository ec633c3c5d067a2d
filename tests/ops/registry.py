"""What tests read in the registry of operators; nothing else here knows its private names."""

import dataclasses

from unimoe_kernels import _backends


def declared():
    """Names of all operators, backward operators among them."""
    return [operator.name for operator in _backends.operators()]


def differentiable(op):
    """Whether an operator is declared with a gradient formula."""
    return bool(_backends._operators[op].recorded)


def overloads(op):
    """The overloads of an operator by name."""
    return _backends._operators[op].overloads


def set_available(monkeypatch, op, by_device):
    """Lets an operator have other backends: names by device type, the automatic choice first."""
    operators = _backends._operators
    monkeypatch.setitem(operators, op, dataclasses.replace(operators[op], available=by_device))


def refuse(op):
    """Calls the gradient formula of operators that have none."""
    _backends._refuse(op, None, None)


def operator(op):
    """An operator as it was declared."""
    return _backends._operators[op]


def replaced(declared, **changes):
    """The same operator, declared otherwise."""
    return dataclasses.replace(declared, **changes)
