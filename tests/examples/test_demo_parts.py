"""Messages of processes that train a part of the demo, and how they are handled."""

from pathlib import Path

import part_bodies
import pytest
import torch

pytest.importorskip("PIL", reason="pillow is not installed: pip install .[media]")
from examples.demo import parts
from examples.demo.progress import replay
from unimoe_model.training.progress import SilentReporter

RECIPE, FEATURES = Path("moe.yaml"), Path("features")


class Messages(list):
    """A queue."""

    put = list.append


@pytest.fixture
def run(monkeypatch):
    """Runs the body of the process over training that a test gives; keeps its messages."""
    monkeypatch.setattr(parts, "_exit_with_parent", lambda: None)
    monkeypatch.setattr(parts, "disable_progress_bar", lambda: None)
    messages = Messages()

    def body(train, recipe=RECIPE):
        monkeypatch.setattr(parts, "train_arm", train)
        threads = torch.get_num_threads()
        parts._body("moe", recipe, 3, FEATURES, messages, threads)
        return messages

    body.messages = messages
    return body


def failing(error):
    def train(*arguments):
        raise error

    return train


@pytest.mark.parametrize("error", [ValueError, OSError, RuntimeError, ModuleNotFoundError])
def test_errors_of_the_user_are_passed_on_without_a_traceback(run, error):
    told = run(failing(error("output holds another run")))
    assert told == [("moe", "failed", ("output holds another run",), {})]


def test_a_recipe_that_is_not_there_is_named(run, tmp_path):
    ((name, call, (text,), _),) = run(parts.train_arm, tmp_path / "none.yaml")
    assert (name, call) == ("moe", "failed")
    assert text.startswith(f"recipe ({tmp_path / 'none.yaml'}) must be a readable YAML file")


def test_other_errors_are_shown_whole(run):
    with pytest.raises(KeyError):
        run(failing(KeyError("rows")))
    assert run.messages == [("moe", "failed", ("KeyError: 'rows'",), {})]


def test_progress_and_the_end_are_passed_on(run):
    def train(recipe, seed, features, reporter):
        assert (recipe, seed, features) == (RECIPE, 3, FEATURES)
        reporter.start("tune", 2, 0)
        reporter.advance(2, loss="0.5")
        reporter.finish()
        reporter.say("kept")

    class Told(SilentReporter):
        calls = Messages()

        def start(self, *arguments):
            self.calls.append(arguments)

        def advance(self, *arguments, **figures):
            self.calls.append((arguments, figures))

        def say(self, text):
            self.calls.append(text)

    *told, last = run(train)
    assert last == ("moe", "done", (), {})
    for message in told:
        replay(message, {"moe": Told()})
    assert Told.calls == [("tune", 2, 0), ((2,), {"loss": "0.5"}), "kept"]


def run_two(folder, target):
    recipes = {name: folder / f"{name}.yaml" for name in ("moe", "dense")}
    parts.run_parts(recipes, 3, folder / "features", 1, target)


def test_a_part_that_fails_ends_the_others(tmp_path):
    with pytest.raises(RuntimeError, match=r"^training of moe failed: disk is full$"):
        run_two(tmp_path, part_bodies.fail_or_wait)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("body", "code"), [("die", 9), ("leave", 0)])
def test_a_process_that_ends_without_a_word_is_named(tmp_path, body, code):
    with pytest.raises(RuntimeError, match=rf"^training of \w+ ended with exit code {code}$"):
        run_two(tmp_path, getattr(part_bodies, body))


def test_parts_get_what_they_are_asked_for_and_show_progress(tmp_path, capfd):
    run_two(tmp_path, part_bodies.tell)
    shown = capfd.readouterr()
    for name in ("moe", "dense"):
        asked = f"{tmp_path / name}.yaml 3 {tmp_path / 'features'} 1"
        assert f"{name} of {asked}\n" in shown.out
        assert f"{name:>5} tune: 100%" in shown.err
