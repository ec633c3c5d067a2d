"""A checkpoint written by 2 x 2 ranks, read at other sizes, and what is not one."""

import json
import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from launcher import found
from small_model import SmallModel, joined, loss_of

from unimoe_kernels.distributed import (
    discard_sharded,
    load_sharded,
    load_weights,
    parameter_groups,
    save_sharded,
    save_weights,
    unparallelize_moe,
    whole_state_dict,
)
from unimoe_kernels.distributed.running.checkpoint import _empty_optimizer_state
from unimoe_kernels.distributed.running.start import select_gpu


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder that four ranks wrote, and what they found when they read it at once."""
    folder = tmp_path_factory.mktemp("saved")
    return folder, found("checkpoint_ranks.py", 4, folder, 2, 4)


def check(results, layouts):
    assert sorted({case.split(":")[0] for case in results}) == sorted(layouts)
    assert len(results) == 10 * len(layouts)
    assert all(results.values()), [case for case, same in results.items() if not same]


def test_four_ranks_read_it_as_2x2_and_4x1(saved):
    check(saved[1], ["2x2", "4x1"])


def test_two_ranks_read_it_as_1x2_and_2x1(saved):
    check(found("checkpoint_ranks.py", 2, saved[0], 1, 2), ["1x2", "2x1"])


@pytest.mark.parametrize("way", ["replicate", "shard"])
def test_one_process_reads_it(saved, way):
    folder = saved[0]
    expected = torch.load(folder / f"{way}.expected")
    model, optimizer = fresh(seed=1)
    assert load_sharded(folder / way, model, [optimizer]) == {"step": 3}
    names = {parameter: name for name, parameter in model.named_parameters()}
    held = dict(model.state_dict())
    for parameter, state in optimizer.state.items():
        held |= {f"{key} of {names[parameter]}": value for key, value in state.items()}
    assert held.keys() == expected.keys()
    assert all(torch.equal(held[key], value) for key, value in expected.items())
    model, _ = fresh(seed=2)
    load_weights(model, folder / f"{way}.safetensors")
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


def fresh(seed=0, steps=0):
    model = SmallModel()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(seed))
    optimizer = torch.optim.AdamW(parameter_groups(model.parameters()), lr=1e-2)
    for step in range(steps):
        inputs = joined(2, step, "natural")
        optimizer.zero_grad()
        loss_of(model, inputs, 10)[0].backward()
        optimizer.step()
    return model, optimizer


def test_training_goes_on_as_if_it_had_not_stopped(tmp_path):
    expected, _ = fresh(steps=4)
    model, optimizer = fresh(steps=2)
    save_sharded(tmp_path / "c", model, [optimizer])
    model, optimizer = fresh(seed=9)
    load_sharded(tmp_path / "c", model, [optimizer])
    for step in (2, 3):
        optimizer.zero_grad()
        loss_of(model, joined(2, step, "natural"), 10)[0].backward()
        optimizer.step()
    for actual, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(actual, wanted)


def test_nothing_there_changes_nothing(tmp_path):
    model, optimizer = fresh(steps=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert load_sharded(tmp_path / "none", model, [optimizer]) is None
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert optimizer.state


def test_a_kill_between_the_two_renames_leaves_the_old_one(tmp_path):
    model, _ = fresh()
    save_sharded(tmp_path / "c", model, extra={"step": 1})
    os.rename(tmp_path / "c", tmp_path / "c.old")
    (tmp_path / "c.new").mkdir()
    assert load_sharded(tmp_path / "c", fresh(seed=3)[0]) == {"step": 1}
    save_sharded(tmp_path / "c", model, extra={"step": 2})
    assert load_sharded(tmp_path / "c", model) == {"step": 2}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c"]
    discard_sharded(tmp_path / "c")
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    model, optimizer = fresh(steps=1)
    save_sharded(tmp_path / "c", model, [optimizer])
    other = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="is of another model"):
        load_sharded(tmp_path / "c", other)
    model.head = torch.nn.Linear(3, 7, dtype=torch.float64)
    before = model.embed.weight.clone()
    model.embed.weight.data += 1
    with pytest.raises(ValueError, match=r"head\.weight of shape \(7, 12\), the model of shape"):
        load_sharded(tmp_path / "c", model, [optimizer])
    assert torch.equal(model.embed.weight, before + 1)


def test_optimisers_must_be_those_that_were_saved(tmp_path):
    model, optimizer = fresh(steps=1)
    save_sharded(tmp_path / "c", model, [optimizer, torch.optim.SGD([model.head.weight], 0.1)])
    few = torch.optim.AdamW([model.head.weight])
    with pytest.raises(ValueError, match=r"optimizers\[0\] must hold"):
        load_sharded(tmp_path / "c", model, [few])
    with pytest.raises(ValueError, match="that is not in the model"):
        save_sharded(tmp_path / "d", torch.nn.Linear(2, 2), [optimizer])


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps(Evil())])
def test_an_index_that_is_none_is_refused_and_not_run(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    model, _ = fresh()
    save_sharded(tmp_path / "c", model)
    (tmp_path / "c" / ".metadata").write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read"):
        load_sharded(tmp_path / "c", model)
    assert not (tmp_path / "evil").exists()


def test_weights_of_another_model_are_refused(tmp_path):
    model, _ = fresh()
    save_weights(model, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="are of another model"):
        load_weights(torch.nn.Linear(2, 2), tmp_path / "w.safetensors")
    model.head = torch.nn.Linear(3, 7, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"have head\.weight of shape \(7, 12\)"):
        load_weights(model, tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors").write_bytes(b"cut short")
    with pytest.raises(ValueError, match="cannot be read"):
        load_weights(model, tmp_path / "w.safetensors")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": {"a": "../w.safetensors"}}'])
def test_an_index_of_other_files_is_refused(tmp_path, content):
    model, _ = fresh()
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"weights \(.*index\.json\) must "):
        load_weights(model, tmp_path / "c")


def test_tied_weights_are_written_once(tmp_path):
    model = torch.nn.ModuleList([torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)])
    model[1].weight = model[0].weight
    save_weights(model, tmp_path / "w.safetensors")
    weight = model[0].weight.detach().clone()
    torch.nn.init.zeros_(model[1].weight)
    load_weights(model, tmp_path / "w.safetensors")
    assert torch.equal(model[1].weight, weight)
    assert len(whole_state_dict(model)) == 4


def test_extra_is_json(tmp_path):
    save_sharded(tmp_path / "c", torch.nn.Linear(2, 2), extra={"losses": [0.5]})
    assert json.loads((tmp_path / "c" / "extra.json").read_text()) == {"losses": [0.5]}


def test_only_a_parallel_model_is_put_together():
    with pytest.raises(ValueError, match=r"model \(Linear\) must be one of parallelize_moe"):
        unparallelize_moe(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("options", "device"), [({}, "cpu"), ({"fused": True}, "meta"), ({"capturable": True}, "meta")]
)
def test_steps_are_on_the_device_on_which_the_optimizer_reads_them(options, device):
    parameter = torch.nn.Parameter(torch.zeros(2, 3, device="meta"))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    optimizer.param_groups[0] |= options
    entries = {
        f"optimizer.0.{key}.w": SimpleNamespace(
            size=size, properties=SimpleNamespace(dtype=torch.float32)
        )
        for key, size in (("step", torch.Size([])), ("exp_avg", parameter.shape))
    }
    made = _empty_optimizer_state(Path("c"), {"w": parameter}, [optimizer], entries)
    devices = {key: tensor.device.type for _, _, key, tensor in made.values()}
    assert devices == {"step": device, "exp_avg": "meta"}


@pytest.mark.parametrize(
    ("device", "local", "expected"),
    [("cuda", "3", [3]), ("cuda:1", "3", [1]), ("cuda", None, []), ("cpu", "3", [])],
)
def test_the_gpu_of_the_local_rank_is_selected(monkeypatch, device, local, expected):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local is not None:
        monkeypatch.setenv("LOCAL_RANK", local)
    select_gpu(torch.device(device))
    assert chosen == expected
