"""Requests for texts that the language model writes itself."""

from examples.smol.sources.writing import REQUESTS, requests


def test_each_name_is_asked_about_once_in_all_kinds():
    names = [f"thing {number}" for number in range(12)]
    found = requests([*reversed(names), *names])
    assert len(found) == len(set(found)) == 12
    kinds = [request.partition("{")[0] for request in REQUESTS]
    for kind in kinds:
        assert sum(request.startswith(kind) for request in found) in (2, 3)
    assert found == requests(names)
    assert found[0] == "Write a few sentences about this: thing 0"
    assert requests([]) == []
