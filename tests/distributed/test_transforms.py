"""What crosses ranks refuses transforms of torch, before anything is sent."""

import pytest
import torch
from torch.autograd import forward_ad

from unimoe_kernels.distributed import ExpertDispatcher, all_to_all


class OneRank:
    """Stands for a process group: nothing may be asked of it but its size."""

    def size(self):
        return 1


def sent(rows):
    return all_to_all(rows, [3], [3], OneRank())


def dispatched(rows):
    ids = torch.zeros(3, 1, dtype=torch.int32)
    dispatcher = ExpertDispatcher(OneRank(), 2, "layers.0")
    return dispatcher(lambda rows, ids, scores: rows, rows, ids, torch.ones(3, 1))


@pytest.mark.parametrize(
    ("function", "name"), [(sent, "all_to_all"), (dispatched, "dispatch of layers.0")]
)
def test_transforms_are_refused(function, name):
    rows = torch.randn(3, 2)
    message = f"{name} does not support torch.func"
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jvp(function, (rows,), (rows,))
    with pytest.raises(NotImplementedError, match=message):
        torch.func.grad(lambda rows: function(rows).sum())(rows)
    with pytest.raises(NotImplementedError, match=message):
        torch.vmap(function)(rows.unsqueeze(0))
    with pytest.raises(NotImplementedError, match=message), forward_ad.dual_level():
        function(forward_ad.make_dual(rows, rows))
