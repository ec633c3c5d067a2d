import errno
import json
import os
import signal
from dataclasses import replace

import pytest
import torch
import torch.distributed.checkpoint as dcp

from unimoe_kernels.distributed.running import checkpoint as sharded
from unimoe_kernels.testing import relative_error
from unimoe_model.training.checkpoint import (
    Progress,
    completed_run,
    discard_checkpoint,
    fingerprint,
    load_checkpoint,
    save_checkpoint,
)
from unimoe_model.training.gradients import Objective, add_gradients
from unimoe_model.training.loop import finish_stage, train_stage
from unimoe_model.training.loss import answer_loss, autocast
from unimoe_model.training.optimization import Optimization, build_optimizers
from unimoe_model.training.ranks import Ranks
from unimoe_model.training.stopping import StoppedError

SETTINGS = Optimization(steps=6, batch_size=2, learning_rate=1e-2, muon_learning_rate=1e-2)


class Killed(BaseException):
    pass


class Recorder:
    """Keeps what a stage reports."""

    def __init__(self):
        self.started, self.steps, self.finished = [], 0, 0

    def start(self, stage, total, done):
        self.started.append((stage, total, done))

    def advance(self, steps, **figures):
        self.steps += steps

    def finish(self):
        self.finished += 1


def batch_of(step):
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(20, 250, (2, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    labels = torch.full_like(ids, -100)
    labels[0, -3:] = ids[0, -3:]
    labels[1, 4:6] = ids[1, 4:6]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def killed_at(step):
    def batch(asked):
        if asked == step:
            raise Killed
        return batch_of(asked)

    return batch


@pytest.fixture
def train(tiny_model, tmp_path):
    """Trains a fresh model with dropout; gives the model, its parameters and the progress."""

    def run(batch=batch_of, folder="stage", run="r", settings=SETTINGS, reporter=None, **options):
        dropped = {"text_config": {"attention_dropout": 0.2}, "load_balancing_coef": 0.1}
        model = tiny_model(**options.pop("fields", dropped))
        parameters = {n: p for n, p in model.named_parameters() if "connector" not in n}
        (tmp_path / folder).mkdir(exist_ok=True)
        progress = train_stage(
            model,
            parameters,
            batch,
            settings,
            tmp_path / folder,
            run,
            "stage",
            reporter or Recorder(),
            checkpoint_seconds=options.pop("checkpoint_seconds", -1.0),
            **options,
        )
        return model, parameters, progress

    return run


@pytest.mark.parametrize("muon", [None, 1e-2])
def test_killed_and_resumed_is_bit_for_bit_the_uninterrupted_run(train, tmp_path, muon):
    settings = Optimization(6, 2, 1e-2, muon_learning_rate=muon, weight_decay=0.1)
    _, whole, expected = train(folder="whole", settings=settings)
    for step in (1, 4):
        with pytest.raises(Killed):
            train(killed_at(step), settings=settings)
    torch.manual_seed(99)
    reporter = Recorder()
    _, resumed, progress = train(settings=settings, reporter=reporter)
    assert reporter.started == [("stage", 6, 4)]
    assert reporter.steps == 2
    assert progress.losses == expected.losses
    assert progress.tokens == expected.tokens == 6 * 15
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_training_changes_the_given_parameters_and_no_other(train, tiny_model):
    fresh = dict(tiny_model().named_parameters())
    model, parameters, progress = train()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name in parameters)
        assert torch.equal(parameter, fresh[name]) == (name not in parameters), name
    assert not model.training
    assert len(progress.losses) == 6
    assert progress.seconds > 0


def test_training_lowers_the_loss(train):
    _, _, progress = train(lambda step: batch_of(0), settings=Optimization(20, 2, 1e-2))
    assert progress.losses[-1] < 0.5 * progress.losses[0]


def test_bf16_stays_close_to_fp32(train):
    _, _, fp32 = train(folder="a")
    _, _, bf16 = train(folder="b", objective=Objective(precision="bf16"))
    assert bf16.losses != fp32.losses
    assert bf16.losses == pytest.approx(fp32.losses, rel=0.1)


def test_a_loss_that_is_not_finite_stops_the_stage(train, tiny_model, tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    parameters = dict(model.named_parameters())
    with pytest.raises(ValueError, match=r"loss of align, step 0 \(nan\) must be finite"):
        train_stage(model, parameters, batch_of, SETTINGS, tmp_path, "r", "align", Recorder())


def test_loss_of_answers_is_the_loss_of_the_whole_head(tiny_model):
    model, batch = tiny_model(), batch_of(3)
    assert relative_error(answer_loss(model, batch), model(**batch).loss) < 1e-6


def test_checkpoint_of_another_run_changes_nothing(train, tiny_model, tmp_path):
    with pytest.raises(Killed):
        train(killed_at(3))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match=r"is of another configuration \(r, this run is other\)"):
        train(run="other")
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "extra.json"])
@pytest.mark.parametrize("keep", [0, 0.5])
def test_cut_checkpoint_is_refused_and_changes_nothing(train, tiny_model, tmp_path, name, keep):
    with pytest.raises(Killed):
        train(killed_at(3))
    path = tmp_path / "stage" / "checkpoint" / name
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    model = tiny_model()
    parameters = {n: p for n, p in model.named_parameters() if "connector" not in n}
    optimizers = build_optimizers(parameters, SETTINGS)
    before = {n: p.clone() for n, p in parameters.items()}
    with pytest.raises(ValueError, match=r"checkpoint .* cannot be read.* delete it"):
        load_checkpoint(tmp_path / "stage" / "checkpoint", "r", parameters, optimizers)
    assert all(torch.equal(before[n], p) for n, p in parameters.items())
    assert not any(optimizer.state for optimizer in optimizers)


@pytest.fixture
def small(tmp_path):
    parameters = {"w": torch.nn.Parameter(torch.arange(3.0))}
    return tmp_path / "checkpoint", parameters, [torch.optim.AdamW(parameters.values())]


def test_kill_while_saving_leaves_the_old_checkpoint(small, monkeypatch):
    folder, parameters, optimizers = small
    save_checkpoint(folder, "r", Progress(1, [0.5], 3, 1.0), parameters, optimizers)
    with torch.no_grad():
        parameters["w"].add_(1)

    def killed(*_, **__):
        raise Killed

    for module, name in ((dcp, "save"), (sharded, "replace_folder")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, killed)
            with pytest.raises(Killed):
                save_checkpoint(folder, "r", Progress(2, [0.5, 0.4]), parameters, optimizers)
        progress = load_checkpoint(folder, "r", parameters, optimizers)
        assert (progress.step, progress.tokens) == (1, 3)
        assert parameters["w"].tolist() == [0, 1, 2]


def test_kill_between_the_renames_leaves_a_checkpoint(small):
    folder, parameters, optimizers = small
    save_checkpoint(folder, "r", Progress(1, [0.5]), parameters, optimizers)
    folder.rename(folder.with_name("checkpoint.old"))
    assert load_checkpoint(folder, "r", parameters, optimizers).step == 1


def test_no_checkpoint_is_no_error(small):
    assert load_checkpoint(small[0], "r", *small[1:]) is None


def test_discarded_checkpoints_are_gone(small):
    folder, parameters, optimizers = small
    save_checkpoint(folder, "r", Progress(1, [0.5]), parameters, optimizers)
    discard_checkpoint(folder)
    assert load_checkpoint(folder, "r", parameters, optimizers) is None


def test_finished_stage_is_complete_for_its_run_only(tmp_path):
    assert not completed_run(tmp_path, "r")
    finish_stage(tmp_path, "r", SETTINGS, Progress(2, [1.0, 0.5], 30, 1.5))
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["losses"] == [1.0, 0.5]
    assert metrics["settings"]["learning_rate"] == 1e-2
    assert (metrics["tokens"], metrics["seconds"]) == (30, 1.5)
    assert completed_run(tmp_path, "r")
    with pytest.raises(ValueError, match=r"another configuration \(r, this run is other\)"):
        completed_run(tmp_path, "other")
    (tmp_path / "metrics.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        completed_run(tmp_path, "r")


def test_parts_of_a_batch_add_up_to_the_whole(train, monkeypatch):
    # Muon in bfloat16 would enlarge the rounding of the sums.
    name = "unimoe_model.training.optimization.multiplies_bf16"
    monkeypatch.setattr(name, lambda device: False)

    def in_parts(step):
        batch = batch_of(step)
        return [{key: value[row : row + 1] for key, value in batch.items()} for row in range(2)]

    plain = {"text_config": {"attention_dropout": 0.0}, "load_balancing_coef": 0.0}
    _, whole, expected = train(folder="whole", fields=plain)
    _, parts, progress = train(in_parts, folder="parts", fields=plain)
    assert progress.losses == pytest.approx(expected.losses, rel=1e-5)
    assert progress.tokens == expected.tokens
    assert all(relative_error(parts[name], whole[name]) < 1e-3 for name in whole)


def test_router_losses_of_parts_count_as_their_mean(tiny_model):
    model = tiny_model(load_balancing_coef=1.0)
    scales = []
    for _, moe in model.moe_layers():
        moe.register_forward_pre_hook(lambda moe, _: scales.append(moe.aux_loss_scale))
    batch = batch_of(0)
    model.train()
    add_gradients(model, [batch] * 4, Objective(), Ranks(), "stage")
    assert scales == [0.25] * 8
    assert [moe.aux_loss_scale for _, moe in model.moe_layers()] == [1.0, 1.0]


def test_modality_losses_of_parts_add_up_to_those_of_the_batch(tiny_model):
    coefficients = {"modality_kl_coef": 5.0, "modality_expert_coef": 5.0}
    model = tiny_model(load_balancing_coef=0.0, modality_experts={"image": [0]}, **coefficients)
    model.double().train()
    batch = batch_of(0)
    image = model.config.media_token_ids["image"]
    batch["input_ids"][:, 1:4] = image
    generator = torch.Generator().manual_seed(1)
    batch["image_features"] = torch.randn(2, 3, 12, generator=generator, dtype=torch.float64)
    parts = [{key: value[row : row + 1] for key, value in batch.items()} for row in range(2)]
    routers = [moe.router.weight for _, moe in model.moe_layers()]
    found = []
    for given in (batch, parts, [batch]):
        model.zero_grad()
        add_gradients(model, given, Objective(), Ranks(), "stage")
        found.append(torch.stack([weight.grad for weight in routers]))
    for of_parts in found[1:]:
        assert relative_error(of_parts, found[0]) < 1e-9
    for layer in model.model.language_model.layers:
        assert layer.modality_loss_scale == 1
        layer.expert_coef = layer.kl_coef = 0
    model.zero_grad()
    add_gradients(model, batch, Objective(), Ranks(), "stage")
    assert relative_error(torch.stack([weight.grad for weight in routers]), found[0]) > 0.1


def test_gradient_checkpointing_changes_no_number(train):
    plain = {"text_config": {"attention_dropout": 0.0}}
    _, whole, _ = train(folder="whole", fields=plain)
    settings = replace(SETTINGS, gradient_checkpointing=True)
    _, again, _ = train(folder="again", fields=plain, settings=settings)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_batches_made_ahead_are_the_same(train):
    _, whole, expected = train(folder="whole")
    _, ahead, progress = train(folder="ahead", workers=2)
    assert progress.losses == expected.losses
    assert all(torch.equal(whole[name], ahead[name]) for name in whole)


def test_an_error_of_a_batch_made_ahead_is_raised_at_its_step(train):
    def batch(step):
        if step == 3:
            raise ValueError("line 7 is damaged")
        return batch_of(step)

    reporter = Recorder()
    with pytest.raises(ValueError, match="line 7 is damaged"):
        train(batch, reporter=reporter, workers=2)
    assert reporter.steps == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_stage_after_its_step_and_a_checkpoint(train, number):
    def batch(step):
        if step == 2:
            os.kill(os.getpid(), number)
        return batch_of(step)

    _, whole, expected = train(folder="whole")
    with pytest.raises(StoppedError, match="stopped after step 3 of stage") as stopped:
        train(batch, checkpoint_seconds=1e9)
    assert stopped.value.signal == number
    assert signal.getsignal(number) is not None
    _, resumed, progress = train(batch_of)
    assert progress.losses == expected.losses
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_full_disk_is_named_and_leaves_the_checkpoint_before(small, monkeypatch):
    folder, parameters, optimizers = small
    save_checkpoint(folder, "r", Progress(1, [0.5]), parameters, optimizers)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(dcp.FileSystemWriter, "write_data", full)
        with pytest.raises(OSError, match=r"is full: the checkpoint of step 2 needs 12 bytes"):
            save_checkpoint(folder, "r", Progress(2, [0.5, 0.4]), parameters, optimizers)
    assert not folder.with_name("checkpoint.new").exists()
    assert load_checkpoint(folder, "r", parameters, optimizers).step == 1


def test_a_batch_that_passes_nothing_trained_changes_nothing(tiny_model, tmp_path):
    model = tiny_model()
    parameters = {n: p for n, p in model.named_parameters() if "audio_connector" in n}
    before = {n: p.clone() for n, p in parameters.items()}
    train_stage(model, parameters, batch_of, SETTINGS, tmp_path, "r", "align", Recorder())
    assert all(torch.equal(before[n], p) for n, p in parameters.items())


def test_a_batch_without_labels_is_refused(train):
    def batch(step):
        return batch_of(step) | {"labels": torch.full((2, 9), -100)}

    with pytest.raises(ValueError, match="batch of stage, step 0 must have a labelled token"):
        train(batch)


def test_fingerprint_tells_settings_apart():
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    assert fingerprint([1, 2]) != fingerprint([2, 1])


def test_unknown_precision_is_refused():
    with pytest.raises(ValueError, match=r"precision \('fp8'\)"):
        autocast(torch.device("cpu"), "fp8")
