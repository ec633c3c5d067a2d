import subprocess
import sys

import pytest

pytest.importorskip("scipy", reason="scipy is not installed: pip install .[media]")
pytest.importorskip("soundfile", reason="soundfile is not installed: pip install .[media]")
pytest.importorskip("PIL", reason="pillow is not installed: pip install .[media]")
from PIL import Image

from unimoe_model import processing
from unimoe_model.cli import main
from unimoe_model.processing import UniMoEProcessor


@pytest.fixture
def checkpoint(tiny_model, tokenizer, tmp_path, encoders):
    model = tiny_model()
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    UniMoEProcessor.from_config(model.config, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.new("RGB", (20, 30), "red").save(path)
    return path


@pytest.fixture
def refused(capsys):
    """Runs a command that must fail; gives the one line it writes to stderr."""

    def run(*arguments):
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 1
        shown = capsys.readouterr()
        assert shown.out == ""
        lines = [line for line in shown.err.splitlines() if line.startswith("unimoe ")]
        assert len(lines) == 1
        assert "Traceback" not in shown.err
        return lines[0]

    return run


def test_generate_prints_the_answer(checkpoint, picture, capsys):
    arguments = ["generate", "--model", checkpoint, "--image", picture, "what shape is it?"]
    assert main([str(a) for a in [*arguments, "--max-new-tokens", 3]]) == 0
    assert capsys.readouterr().out.strip()


def test_help_names_the_commands():
    command = [sys.executable, "-m", "unimoe_model.cli", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for name in ("train", "generate", "chat", "convert", "assemble", "eval", "routing"):
        assert name in shown


def test_help_loads_nothing_heavy():
    code = (
        "import sys, unimoe_model.cli as c\n"
        "try: c.main(['--help'])\n"
        "except SystemExit: print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip().endswith("[]")


def test_unknown_command_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["answer"])
    assert stopped.value.code == 2


def test_missing_recipe(refused, tmp_path):
    output = tmp_path / "runs"
    line = refused("train", tmp_path / "none.yaml", "--output", output)
    assert line.startswith(f"unimoe train: recipe ({tmp_path / 'none.yaml'}) must be")
    assert not output.exists()


def test_wrong_recipe(refused, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("seed: 0\nspeed: 1\n")
    assert "unknown key 'speed'" in refused("train", path, "--output", tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_missing_checkpoint(refused, tmp_path):
    line = refused("generate", "--model", tmp_path / "none", "what?")
    assert "must be a folder with a config.json" in line


def test_cut_checkpoint(refused, checkpoint):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    assert "cannot be read" in refused("generate", "--model", checkpoint, "what?")


def test_missing_and_corrupt_pictures(refused, checkpoint, picture, tmp_path):
    missing = tmp_path / "none.png"
    line = refused("generate", "--model", checkpoint, "what?", "--image", missing)
    assert str(missing) in line
    assert "no such file" in line
    picture.write_bytes(picture.read_bytes()[:60])
    line = refused("generate", "--model", checkpoint, "what?", "--image", picture)
    assert f"image file {picture} must be a whole picture" in line
    line = refused("generate", "--model", checkpoint, "what?", "--video", picture)
    assert f"video file {picture} must be" in line


@pytest.mark.parametrize("kind", ["image", "video", "speech", "audio"])
def test_missing_media_are_named_before_the_model_is_loaded(refused, tmp_path, kind):
    path = tmp_path / "none"
    line = refused("generate", "--model", tmp_path, "what?", f"--{kind}", path)
    assert line == f"unimoe generate: {kind} ({path}) must be a file; there is no such file"


def test_answers_of_no_length(refused, tmp_path):
    line = refused("generate", "--model", tmp_path, "what?", "--max-new-tokens", 0)
    assert line == "unimoe generate: max_new_tokens (0) must be at least 1"


def test_placeholder_without_its_input(refused, checkpoint):
    line = refused("generate", "--model", checkpoint, "what is in <image> there?")
    assert "text holds 1 <image> but 0 image items were given" in line


def test_nothing_to_ask(refused, checkpoint):
    assert "question is empty" in refused("generate", "--model", checkpoint)


def test_missing_encoder_package(refused, checkpoint, picture, monkeypatch):
    monkeypatch.setattr(processing, "_BUILT", {})
    line = refused("generate", "--model", checkpoint, "what?", "--image", picture)
    assert "encoder ('fake-vision') must be one of" in line


def test_output_that_is_a_file(refused, picture):
    line = refused("train", "recipe.yaml", "--output", picture)
    assert line == f"unimoe train: output ({picture}) must be a folder; {picture} is a file"
    below = picture / "runs"
    asked = ("--model", picture.parent, "--data", picture, "--metric", "exact", "--output", below)
    line = refused("eval", *asked)
    assert line == f"unimoe eval: output ({below}) must be a folder; {picture} is a file"
    line = refused("convert", "--from", picture.parent, "--to", picture)
    assert line == f"unimoe convert: to ({picture}) must be a folder; {picture} is a file"


def test_interrupted_command_says_how_to_go_on(capsys, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("unimoe_model.training.command.train_recipe", interrupt)
    assert main(["train", "recipe.yaml"]) == 130
    assert "run the same command to resume" in capsys.readouterr().err
