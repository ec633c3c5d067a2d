"""What a process that trains an arm says when it cannot."""

import pytest
import torch

pytest.importorskip("PIL", reason="pillow is not installed: pip install .[demo]")
from unimoe_model.training import arm


class Messages(list):
    """A queue."""

    put = list.append


@pytest.fixture
def failing(monkeypatch, tmp_path):
    """Runs the body of the process over training that raises an error; gives its messages."""
    monkeypatch.setattr(arm, "_exit_with_parent", lambda: None)
    messages = Messages()

    def run(error):
        def train(*arguments):
            raise error

        monkeypatch.setattr(arm, "train_arm", train)
        threads = torch.get_num_threads()
        arm.arm_process(None, "moe", tmp_path, tmp_path, messages, torch.device("cpu"), threads)

    return run, messages


def test_errors_of_the_user_are_passed_on_without_a_traceback(failing):
    run, messages = failing
    run(ValueError("output holds another run"))
    assert messages == [("moe", "failed", ("output holds another run",), {})]


def test_other_errors_are_shown_whole(failing):
    run, messages = failing
    with pytest.raises(KeyError):
        run(KeyError("rows"))
    assert messages == [("moe", "failed", ("KeyError: 'rows'",), {})]
