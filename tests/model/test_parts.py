"""What a process that trains a part of a run reports when it cannot."""

import pytest
import torch

pytest.importorskip("PIL", reason="pillow is not installed: pip install .[demo]")
from unimoe_model.training import parts


class Messages(list):
    """A queue."""

    put = list.append


@pytest.fixture
def failing(monkeypatch, tmp_path):
    """Runs the body of the process over training that raises an error; gives its messages."""
    monkeypatch.setattr(parts, "_exit_with_parent", lambda: None)
    messages = Messages()

    def run(error, part="moe"):
        def train(*arguments):
            raise error

        monkeypatch.setattr(parts, f"train_{'base' if part == 'base' else 'arm'}", train)
        threads = torch.get_num_threads()
        parts.run_part(None, part, tmp_path, tmp_path, messages, torch.device("cpu"), threads)

    return run, messages


def test_errors_of_the_user_are_passed_on_without_a_traceback(failing):
    run, messages = failing
    run(ValueError("output holds another run"))
    assert messages == [("moe", "failed", ("output holds another run",), {})]


def test_errors_of_what_arms_share_are_passed_on(failing):
    run, messages = failing
    run(OSError("disk is full"), part="base")
    assert messages == [("base", "failed", ("disk is full",), {})]


def test_other_errors_are_shown_whole(failing):
    run, messages = failing
    with pytest.raises(KeyError):
        run(KeyError("rows"))
    assert messages == [("moe", "failed", ("KeyError: 'rows'",), {})]
