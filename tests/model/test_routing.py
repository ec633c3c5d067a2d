"""`unimoe routing`, from a data file to JSON and plot."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install .[eval]")
pytest.importorskip("scipy", reason="scipy is not installed: pip install .[eval]")
pytest.importorskip("soundfile", reason="soundfile is not installed: pip install .[eval]")
pytest.importorskip("PIL", reason="pillow is not installed: pip install .[eval]")
from matplotlib.axes import Axes
from PIL import Image

from unimoe_model.data.audio_io import load_wav
from unimoe_model.data.media_io import load_image
from unimoe_model.evaluation.routing import recorded_routing
from unimoe_model.generation import Answerer


def route(model, data, output):
    return ("routing", "--model", model, "--data", data, "--output", output)


def test_routing_writes_shares_and_their_picture(checkpoint, lines, data, run, tmp_path):
    model, path, output = checkpoint(), data(lines), tmp_path / "new/out"
    code, out, _ = run(*route(model, path, output))
    assert code == 0
    written = json.loads((output / "routing.json").read_text())
    # 4 images and 1 video of 3 soft tokens, 1 clip of 4, 2 sounds of 2.
    media = {"image": 12, "video": 3, "speech": 4, "audio": 4}
    assert written["tokens"] == {"text": written["tokens"]["text"], **media}
    assert f"{written['tokens']['text']} text, 12 image, 3 video, 4 speech, 4 audio" in out
    assert written["layers"] == [0, 1]
    assert written["items"] == 6
    for share in written["shares"].values():
        assert np.shape(share) == (2, 4)
        assert np.sum(share, 1) == pytest.approx(1)
    answerer = Answerer.from_pretrained(model)
    images = [load_image(tmp_path / f"{name}.png") for name in ("red", "blue", "white", "white")]
    speech = [np.asarray(load_wav(tmp_path / "0.wav", 16000))]
    counts = torch.zeros(4, dtype=torch.float64)
    for line, media in (
        (lines[0], {"images": images[:1]}),
        (lines[1], {"images": images[1:3]}),
        (lines[2], {"images": images[3:], "speech": speech}),
    ):
        inputs = answerer.processor.ask(line.get("question", ""), **media)
        with recorded_routing(answerer.model) as chosen, torch.no_grad():
            answerer.model.hidden_states(**inputs)
        is_image = inputs["input_ids"][0] == answerer.model.config.media_token_ids["image"]
        counts += torch.bincount(chosen[1][0][is_image].flatten(), minlength=4)
    assert written["shares"]["image"][1] == pytest.approx((counts / 24).tolist())
    with Image.open(output / "routing.png") as picture:
        assert picture.width > 500
    assert sorted(file.name for file in output.iterdir()) == ["routing.json", "routing.png"]


def test_routing_names_the_layers_that_have_experts(
    checkpoint, lines, data, run, tmp_path, monkeypatch
):
    shown = []
    monkeypatch.setattr(Axes, "set_yticks", lambda self, at, names, **_: shown.append(names))
    fields = {"text_config": {"num_hidden_layers": 3}, "moe_layers": "even"}
    assert run(*route(checkpoint(**fields), data(lines[:1]), tmp_path / "out"))[0] == 0
    written = json.loads((tmp_path / "out/routing.json").read_text())
    assert written["layers"] == [0, 2]
    assert list(written["shares"]) == ["text", "image"]
    assert shown == [["0", "2"]] * 2


def test_routing_of_a_dense_model_is_refused(checkpoint, lines, data, run, tmp_path):
    code, _, line = run(*route(checkpoint(num_experts=0), data(lines), tmp_path / "out"))
    assert code == 1
    assert "model must have MoE layers; this one is dense" in line
    assert not (tmp_path / "out").exists()


def test_routing_names_the_line_of_damaged_media(checkpoint, lines, data, run, tmp_path):
    (tmp_path / "0.wav").write_bytes(b"no recording")
    path = data(lines)
    code, _, line = run(*route(checkpoint(), path, tmp_path / "out"))
    assert code == 1
    assert f"{path} line 3 (id 3): {tmp_path / '0.wav'}: expected a readable recording" in line
    assert not (tmp_path / "out").exists()


def test_routing_without_matplotlib(lines, data, run, tmp_path, monkeypatch):
    modules = __import__("sys").modules
    monkeypatch.delitem(modules, "unimoe_model.evaluation.plots", raising=False)
    for name in [name for name in modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(modules, name)
    monkeypatch.setitem(modules, "matplotlib", None)
    code, _, line = run(*route(tmp_path / "none", data(lines), tmp_path / "out"))
    assert code == 1
    assert "routing needs the package matplotlib: pip install 'unimoe[eval]'" in line
