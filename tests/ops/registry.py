"""What tests read in the registry of operators; nothing else here knows its private names."""

from unimoe_kernels import _backends


def declared():
    """Names of all operators, backward operators among them."""
    return sorted(_backends._overloads)


def differentiable(op):
    """Whether an operator is declared with a gradient formula."""
    return op in _backends._differentiable


def overloads(op):
    """The overloads of an operator by name."""
    return _backends._overloads[op]


def set_available(monkeypatch, op, by_device):
    """Lets an operator have other backends: names by device type, the automatic choice first."""
    monkeypatch.setitem(_backends._available, op, by_device)


def refuse(op):
    """Calls the gradient formula of operators that have none."""
    _backends._refuse(op, None, None)
