"""Checkpoints in the published layouts, tiny and random, and their files."""

import json

import torch
from safetensors.torch import load_file, save_file

from unimoe_model.checkpoints.convert import parameter_shapes
from unimoe_model.configuration import UniMoEConfig

VOCAB, WIDTH, INNER, LAYERS, EXPERTS, QUERIES, SOUND = 300, 32, 24, 3, 4, 5, 64
TOWERS = {"speech": "/path/to/whisper-small", "audio": "/path/to/BEATs_iter3_plus_AS2M.pt"}
EIGHT = "deepspeed_moe.experts.deepspeed_experts"


def matrix(*shape):
    return torch.randn(*shape).bfloat16()


def ffn(prefix):
    shapes = {"gate": (INNER, WIDTH), "up": (INNER, WIDTH), "down": (WIDTH, INNER)}
    return {f"{prefix}{name}_proj.weight": matrix(*shape) for name, shape in shapes.items()}


def llm(moe_layers, eight=False):
    state = {
        "model.embed_tokens.weight": matrix(VOCAB, WIDTH),
        "model.norm.weight": matrix(WIDTH),
        "lm_head.weight": matrix(VOCAB, WIDTH),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        state[f"{prefix}input_layernorm.weight"] = matrix(WIDTH)
        state[f"{prefix}post_attention_layernorm.weight"] = matrix(WIDTH)
        state[f"{prefix}self_attn.rotary_emb.inv_freq"] = matrix(4)
        for name in "qkvo":
            state[f"{prefix}self_attn.{name}_proj.weight"] = matrix(WIDTH, WIDTH)
        if layer not in moe_layers:
            state |= ffn(f"{prefix}mlp.")
            continue
        gate = "deepspeed_moe.gate.wg" if eight else "gate"
        state[f"{prefix}mlp.{gate}.weight"] = matrix(EXPERTS, WIDTH)
        for expert in range(EXPERTS):
            state |= ffn(f"{prefix}mlp.{EIGHT if eight else 'experts'}.{expert}.")
    return state


def vision():
    tower = "model.vision_tower.vision_tower.vision_model.embeddings."
    return {
        "model.mm_projector.0.weight": matrix(WIDTH, 12),
        "model.mm_projector.0.bias": matrix(WIDTH),
        "model.mm_projector.2.weight": matrix(WIDTH, WIDTH),
        "model.mm_projector.2.bias": matrix(WIDTH),
        f"{tower}position_embedding.weight": matrix(1 + 9, 12),
    }


def aligner(hears):
    """Random weights of a connector, by published names."""
    config = UniMoEConfig(
        text_config={"hidden_size": WIDTH, "num_hidden_layers": 1, "vocab_size": VOCAB},
        **connector_fields(hears),
    )
    names = {
        "speech": {
            "query_tokens": "model.query_tokens",
            "decoder.": "model.mm_audio_aligner.decoder.audio_decoder.",
        },
        "audio": {
            "query_tokens": "model.mm_audio_aligner.query_tokens",
            "qformer.": "model.mm_audio_aligner.qformer.qformer.",
        },
    }[hears] | {"projector.": "model.mm_audio_aligner.projector."}
    state = {}
    prefix = f"model.{hears}_connector."
    for name, shape in parameter_shapes(config).items():
        if name.startswith(prefix):
            name = name.removeprefix(prefix)
            own = next(own for own in names if name.startswith(own))
            state[names[own] + name.removeprefix(own)] = matrix(*shape)
    unused = "model.mm_audio_aligner.decoder.audio_decoder.embed_tokens.weight"
    if unused in state:
        state[unused] = matrix(VOCAB, SOUND)
    return state


def connector_fields(hears):
    sizes = {
        "speech": {
            "d_model": SOUND,
            "decoder_layers": 2,
            "decoder_attention_heads": 1,
            "decoder_ffn_dim": 24,
            "max_target_positions": 9,
        },
        "audio": {
            "hidden_size": SOUND,
            "num_hidden_layers": 4,
            "num_attention_heads": 1,
            "intermediate_size": 24,
            "cross_attention_frequency": 2,
        },
    }[hears]
    return {
        f"{hears}_connector": sizes,
        f"{hears}_feature_size": SOUND,
        f"{hears}_num_queries": QUERIES,
    }


def published_config(hears=None, experts=True, **more):
    config = {
        "model_type": "llava",
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if experts:
        config |= {"moe": True, "num_experts": EXPERTS, "num_experts_per_tok": 2}
    if hears:
        config |= {
            "mm_vision_tower": "openai/clip-vit-large-patch14-336",
            "mm_hidden_size": 12,
            "mm_audio_tower": {
                "speech": "/path/whisper-small",
                "audio": "BEATs_iter3_plus_AS2M.pt",
            }[hears],
            "mm_audio_hidden_size": SOUND,
            "query_tokens_size": QUERIES,
            "image_aspect_ratio": "pad",
        }
    return config | more


def write(folder, state, config, files=2, pickled=False):
    """A published checkpoint of several files."""
    folder.mkdir(parents=True)
    names = sorted(state)
    stem, suffix = ("pytorch_model", ".bin") if pickled else ("model", ".safetensors")
    weight_map = {}
    for number in range(files):
        file = f"{stem}-{number + 1:05}-of-{files:05}{suffix}"
        part = {name: state[name] for name in names[number::files]}
        weight_map |= dict.fromkeys(part, file)
        torch.save(part, folder / file) if pickled else save_file(part, folder / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def read_all(folder):
    return {
        name: tensor
        for path in sorted(folder.glob("model*.safetensors"))
        for name, tensor in load_file(path).items()
    }


LAYOUTS = {
    "every layer, speech": ("speech", range(LAYERS), False),
    "even layers, audio": ("audio", (0, 2), False),
    "eight-expert code": ("speech", (1,), True),
}


def published(name):
    torch.manual_seed(0)
    hears, layers, eight = LAYOUTS[name]
    return llm(layers, eight) | vision() | aligner(hears), published_config(hears)


def adapter(folder, state, router_lora=False):
    """LoRA on an expert and an attention map, new gates, projector and aligner."""
    torch.manual_seed(2)
    folder.mkdir()
    targets = [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.experts.1.down_proj",
        *(["model.layers.0.mlp.gate"] if router_lora else []),
    ]
    loras = {}
    for target in targets:
        rows, columns = state[f"{target}.weight"].shape
        loras[f"base_model.model.{target}.lora_A.weight"] = matrix(2, columns)
        loras[f"base_model.model.{target}.lora_B.weight"] = matrix(rows, 2)
    save_file(loras, folder / "adapter_model.safetensors")
    gate = "model.layers.0.mlp.gate"
    gates = {f"{gate}.weight": state[f"{gate}.weight"] if router_lora else matrix(EXPERTS, WIDTH)}
    if router_lora:
        for half in "AB":
            saved = loras[f"base_model.model.{gate}.lora_{half}.weight"]
            gates[f"{gate}.lora_{half}.default.weight"] = saved.clone()
    torch.save(gates, folder / "mlp_gates.bin")
    projector = {"base_model.model.model.mm_projector.0.bias": matrix(WIDTH)}
    save_file(projector, folder / "non_lora_trainables.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder, loras, gates, projector
