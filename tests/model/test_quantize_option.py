"""`--quantize` of the commands that talk: what they reply with, and what is refused unread."""

import io
import sys

import pytest
import torch

pytest.importorskip("PIL", reason="pillow is not installed: pip install .[media]")
from unimoe_kernels import QuantizedExperts
from unimoe_model.cli import main
from unimoe_model.generation import Answerer


@pytest.fixture
def source(checkpoint):
    return checkpoint(text_config={"hidden_size": 64, "intermediate_size": 64})


@pytest.fixture
def quantized(run, source, tmp_path):
    """A function from a format to the folder that `unimoe quantize` makes."""

    def make(format):
        target = tmp_path / format
        assert run("quantize", "--model", source, "--to", target, "--format", format)[0] == 0
        return target

    return make


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model_is_that_of_the_folder_that_the_command_makes(source, quantized, format, precision):
    expected = Answerer.from_pretrained(quantized(format), precision=precision)
    found = Answerer.from_pretrained(source, precision=precision, quantize=format)
    state = expected.model.state_dict()
    assert found.model.state_dict().keys() == state.keys()
    for name, tensor in found.model.state_dict().items():
        assert tensor.dtype == state[name].dtype
        assert torch.equal(tensor, state[name]), name
    parts = [part for part in found.model.modules() if isinstance(part, QuantizedExperts)]
    assert len(parts) == 2
    assert not found.model.training
    question = "what shape is it?"
    assert found.answer(question) == expected.answer(question) != ""


def test_chat_replies_like_it(source, capsys, monkeypatch):
    def replied(*options):
        monkeypatch.setattr(sys, "stdin", io.StringIO("what shape is it?\n"))
        capsys.readouterr()
        assert main(["chat", "--model", str(source), "--max-new-tokens", "8", *options]) == 0
        return capsys.readouterr().out.split()

    question = "what shape is it?"
    of_int4 = Answerer.from_pretrained(source, quantize="int4").answer(question, 8).split()
    assert replied("--quantize", "int4") == of_int4
    assert replied() == Answerer.from_pretrained(source).answer(question, 8).split() != of_int4


@pytest.mark.parametrize("command", ["chat", "serve"])
def test_what_cannot_be_quantised_is_refused_before_it_is_loaded(
    command, run, source, quantized, monkeypatch
):
    if command == "serve":
        pytest.importorskip("gradio", reason="gradio is not installed: pip install .[serve]")
    folder = quantized("int8")
    (folder / "model.safetensors").unlink()
    options = ("--port", "0") if command == "serve" else ()
    code, _, error = run(command, "--model", folder, "--quantize", "int4", *options)
    assert code == 1
    assert error == (
        f"unimoe {command}: quantize ('int4') is not supported with model ({folder}), which is"
        " quantised"
    )


@pytest.mark.parametrize("command", ["chat", "serve"])
def test_an_unknown_format_is_refused(command, capsys, tmp_path):
    with pytest.raises(SystemExit) as ended:
        main([command, "--model", str(tmp_path / "none"), "--quantize", "int3"])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "argument --quantize: invalid choice: 'int3'" in error
    with pytest.raises(ValueError, match=r"^quantize \('int3'\) must be one of int8, int4$"):
        Answerer.from_pretrained(tmp_path / "none", quantize="int3")


def test_ranks_cannot_share_them(source):
    (source / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"^quantize \('int4'\) is not supported with several"):
        Answerer.from_pretrained(source, mesh=object(), quantize="int4")


def test_widths_that_are_no_multiple_of_a_group_and_dense_models(checkpoint):
    narrow = checkpoint("narrow")
    with pytest.raises(ValueError, match=r"must be a multiple of group_size \(64\)"):
        Answerer.from_pretrained(narrow, quantize="int4")
    dense = checkpoint("dense", num_experts=0)
    with pytest.raises(ValueError, match="experts"):
        Answerer.from_pretrained(dense, quantize="int8")
