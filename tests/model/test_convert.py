"""`unimoe convert`: bit-exact round trips, and models that work."""

import json
import os

import pytest
import torch
from published_checkpoints import (
    EIGHT,
    EXPERTS,
    INNER,
    LAYOUTS,
    WIDTH,
    adapter,
    connector_fields,
    llm,
    matrix,
    published,
    published_config,
    read_all,
    vision,
    write,
)
from safetensors.torch import save_file

from unimoe_kernels.testing import relative_error
from unimoe_model.checkpoints.convert import convert_from_published, convert_to_published
from unimoe_model.checkpoints.files import TensorFiles, shards
from unimoe_model.checkpoints.record import Conversion
from unimoe_model.checkpoints.writing import write_shards
from unimoe_model.cli import main
from unimoe_model.configuration import UniMoEConfig
from unimoe_model.modeling import UniMoEForConditionalGeneration
from unimoe_model.processing import UniMoEProcessor

pytestmark = pytest.mark.usefixtures("shallow_connectors")


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_there_and_back_bit_for_bit(tmp_path, tokenizer_folder, name, pickled):
    before, config = published(name)
    source = write(tmp_path / "source", before, config, files=3, pickled=pickled)
    made = convert_from_published(
        source, tmp_path / "ours", tokenizer=tokenizer_folder, shard_bytes=30_000
    )
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 3
    convert_to_published(tmp_path / "ours", tmp_path / "back", shard_bytes=20_000)
    after = read_all(tmp_path / "back")
    assert after.keys() == before.keys()
    for key, value in before.items():
        assert after[key].dtype == value.dtype
        assert torch.equal(after[key], value), key
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == config
    assert all(reason for reason in made.aside.values())
    assert set(made.aside) < set(before)


def test_pickled_tensors_that_share_memory(tmp_path, tokenizer_folder):
    state, config = published("every layer, speech")
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    norm = "model.norm.weight"
    state[norm] = torch.stack([state[norm], state[norm]], 1)[:, 0]
    source = write(tmp_path / "source", state, config, files=1, pickled=True)
    convert_from_published(source, tmp_path / "ours", tokenizer=tokenizer_folder)
    convert_to_published(tmp_path / "ours", tmp_path / "back")
    after = read_all(tmp_path / "back")
    for name in ("lm_head.weight", "model.embed_tokens.weight", norm):
        assert torch.equal(after[name], state[name])


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_converted_is_a_model(tmp_path, tokenizer_folder, name):
    hears, layers, _ = LAYOUTS[name]
    state, config = published(name)
    source = write(tmp_path / "source", state, config)
    convert_from_published(source, tmp_path / "ours", tokenizer=tokenizer_folder)
    model, found = UniMoEForConditionalGeneration.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert [index for index, _ in model.moe_layers()] == list(layers)
    assert model.config.vision_num_tokens == 9
    assert model.config.vision_encoder == "clip-vit-large-patch14-336"
    for key, value in connector_fields(hears).items():
        mine = getattr(model.config, key)
        assert mine == value if isinstance(value, int) else value.items() <= mine.items()
    _, moe = next(model.moe_layers())
    layer = layers[0]
    expert = f"model.layers.{layer}.mlp.{EIGHT if 'eight' in name else 'experts'}.3.up_proj.weight"
    assert torch.equal(moe.experts.gate_up_proj[3, INNER:], state[expert])
    processor = UniMoEProcessor.from_pretrained(tmp_path / "ours")
    assert processor.image_aspect_ratio == "pad"
    assert processor.system_prompt.startswith("A chat between")
    inputs = processor.ask("abc")
    assert model(**inputs).logits.isfinite().all()
    other = {"speech": "audio", "audio": "speech"}[hears]
    record = Conversion.load(tmp_path / "ours")
    assert {name.split(".")[1] for name in record.initialised} <= {
        f"{other}_connector",
        "speech_connector",
    }


@pytest.mark.parametrize("has_vision", [True, False])
def test_llava_and_llama_are_starting_points(tmp_path, tokenizer_folder, has_vision):
    torch.manual_seed(1)
    state = llm(()) | (vision() if has_vision else {})
    eyes = {"mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_hidden_size": 12}
    config = published_config(experts=False, **(eyes if has_vision else {}))
    source = write(tmp_path / "source", state, config)
    made = convert_from_published(source, tmp_path / "ours", tokenizer=tokenizer_folder)
    kinds = {name.split(".")[1] for name in made.initialised}
    new = {"speech_connector", "audio_connector"}
    assert kinds == (new if has_vision else new | {"image_connector"})
    model = UniMoEForConditionalGeneration.from_pretrained(tmp_path / "ours")
    assert model.config.num_experts == 0
    gate = model.model.language_model.layers[1].mlp.gate_proj.weight
    assert torch.equal(gate, state["model.layers.1.mlp.gate_proj.weight"])
    assert model.model.audio_connector.query_tokens.std() > 0


@pytest.mark.parametrize("router_lora", [False, True])
def test_adapters_are_merged_and_replace(tmp_path, tokenizer_folder, router_lora):
    state, config = published("every layer, speech")
    base = write(tmp_path / "base", state, config)
    folder, loras, gates, projector = adapter(tmp_path / "adapter", state, router_lora)
    made = convert_from_published(folder, tmp_path / "ours", base, tokenizer_folder)
    model = UniMoEForConditionalGeneration.from_pretrained(tmp_path / "ours")
    layer = model.model.language_model.layers[0]

    def merged(target):
        lora = [loras[f"base_model.model.{target}.lora_{half}.weight"] for half in "BA"]
        delta = 2 * lora[0].float() @ lora[1].float()
        return (state[f"{target}.weight"].float() + delta).bfloat16()

    query = merged("model.layers.0.self_attn.q_proj")
    assert torch.equal(layer.self_attn.q_proj.weight, query)
    assert relative_error(query, state["model.layers.0.self_attn.q_proj.weight"]) > 0.1
    down = merged("model.layers.0.mlp.experts.1.down_proj")
    assert torch.equal(layer.mlp.experts.down_proj[1], down)
    gate = "model.layers.0.mlp.gate"
    router = merged(gate) if router_lora else gates[f"{gate}.weight"]
    assert torch.equal(layer.mlp.router.weight, router)
    bias = projector["base_model.model.model.mm_projector.0.bias"]
    assert torch.equal(model.model.image_connector.projector[0].bias, bias)
    assert len(made.merged) == 2 + router_lora


def test_experts_loras_of_the_eight_expert_code(tmp_path, tokenizer_folder):
    state, config = published("eight-expert code")
    base = write(tmp_path / "base", state, config | {"lora_r": 2, "lora_alpha": 4})
    folder, *_ = adapter(tmp_path / "adapter", llm((0,)))
    for path in (folder / "mlp_gates.bin", folder / "adapter_model.safetensors"):
        path.unlink()
    target = "model.layers.0.self_attn.k_proj"
    save_file(
        {
            f"base_model.model.{target}.lora_A.weight": matrix(2, WIDTH),
            f"base_model.model.{target}.lora_B.weight": matrix(WIDTH, 2),
        },
        folder / "adapter_model.safetensors",
    )
    halves = {}
    for number in range(EXPERTS):
        # Each rank numbered its expert 0.
        name = f"model.layers.1.mlp.{EIGHT}.0.down_proj_lora_"
        halves[number] = {f"{name}A.weight": matrix(2, INNER), f"{name}B.weight": matrix(WIDTH, 2)}
        torch.save(halves[number], folder / f"{number}_mlp_experts.bin")
    convert_from_published(folder, tmp_path / "ours", base, tokenizer_folder)
    model = UniMoEForConditionalGeneration.from_pretrained(tmp_path / "ours")
    _, moe = next(model.moe_layers())
    for number, lora in halves.items():
        a, b = lora.values()
        before = state[f"model.layers.1.mlp.{EIGHT}.{number}.down_proj.weight"]
        expected = (before.float() + 2 * b.float() @ a.float()).bfloat16()
        assert torch.equal(moe.experts.down_proj[number], expected)
    (folder / f"{EXPERTS - 1}_mlp_experts.bin").unlink()
    with pytest.raises(ValueError, match=rf"that of expert {EXPERTS - 1} is missing"):
        convert_from_published(folder, tmp_path / "less", base, tokenizer_folder)
    assert not (tmp_path / "less").exists()


@pytest.mark.parametrize("hears", ["speech", "audio"])
def test_the_other_half_lends_its_connector(tmp_path, tokenizer_folder, hears):
    first = "every layer, speech" if hears == "speech" else "even layers, audio"
    second = "even layers, audio" if hears == "speech" else "every layer, speech"
    folders = []
    for name in (first, second):
        state, config = published(name)
        folders.append(write(tmp_path / name, state, config))
    other = {"speech": "audio", "audio": "speech"}[hears]
    made = convert_from_published(
        folders[0], tmp_path / "ours", tokenizer=tokenizer_folder, connector=folders[1]
    )
    assert {n for n in made.initialised if "decoder.embed_tokens" not in n} == set()
    model = UniMoEForConditionalGeneration.from_pretrained(tmp_path / "ours")
    lent, _ = published(second)
    projector = model.model.connector(other).projector.weight
    assert torch.equal(projector, lent["model.mm_audio_aligner.projector.weight"])
    own, _ = published(first)
    projector = model.model.connector(hears).projector.weight
    assert torch.equal(projector, own["model.mm_audio_aligner.projector.weight"])
    with pytest.raises(ValueError, match=f"must hold an aligner for .* it holds one for {hears}"):
        convert_from_published(
            folders[0], tmp_path / "again", tokenizer=tokenizer_folder, connector=folders[0]
        )


def test_command(tmp_path, tokenizer_folder, capsys):
    state, config = published("even layers, audio")
    source = write(tmp_path / "source", state, config)
    arguments = ["--from", source, "--to", tmp_path / "ours", "--tokenizer", tokenizer_folder]
    arguments += ["--set", "video_num_frames=4", "--set", "vision_encoder=clip"]
    assert main(["convert", *map(str, arguments)]) == 0
    shown = capsys.readouterr().out
    assert "kept aside: 4 tensors" in shown
    assert "initialised: speech_connector" in shown
    made = UniMoEConfig.from_pretrained(tmp_path / "ours")
    assert (made.video_num_frames, made.vision_encoder) == (4, "clip")
    back = ["--from", tmp_path / "ours", "--to", tmp_path / "back", "--layout", "published"]
    assert main(["convert", *map(str, back)]) == 0
    assert read_all(tmp_path / "back").keys() == state.keys()
    assert main(["convert", *map(str, arguments)]) == 1
    assert "already exists" in capsys.readouterr().err


def test_files_hold_what_was_read_and_the_index_names_them(tmp_path):
    torch.manual_seed(0)
    state = {
        "a": torch.randn(3, 4),
        "b": torch.randn(5).double(),
        "c": matrix(2, 2, 2),
        "d": torch.tensor([True, False]),
        "e": torch.arange(4),
        "f": torch.empty(0, 3),
        "g": torch.tensor(7.0).half(),
        "h": torch.randn(2).to(torch.float8_e4m3fn),
    }
    total, told = sum(value.nbytes for value in state.values()), []
    layout = {name: value.to("meta") for name, value in state.items()}
    mask = os.umask(0o027)
    try:
        write_shards(tmp_path, layout, state.get, lambda *bytes_: told.append(bytes_), 64)
    finally:
        os.umask(mask)
    assert told[-1] == (total, total)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == total
    files = TensorFiles(shards(tmp_path))
    assert files.meta.keys() == state.keys() == index["weight_map"].keys()
    assert len(set(index["weight_map"].values())) > 2
    for name, value in state.items():
        found, path = files.read(name), tmp_path / index["weight_map"][name]
        assert found.dtype == files.meta[name].dtype == value.dtype
        assert found.shape == files.meta[name].shape == value.shape
        assert torch.equal(found.float(), value.float())
        assert path.stat().st_mode & 0o777 == 0o640
        assert sum(layout[n].nbytes for n, f in index["weight_map"].items() if f == path.name) <= 64
    with pytest.raises(ValueError, match=r"shard_bytes \(0\) must be at least 1"):
        write_shards(tmp_path, layout, state.get, shard_bytes=0)
