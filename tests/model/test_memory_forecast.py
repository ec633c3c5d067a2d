"""Memory of a training step: what simulation on fake tensors says, and what torch allocates.

The measured peak is that of the CPU allocator's own events, which `torch.profiler` records: every
allocation and every release from the building of the model to the end of the second step, added up
in their order. It knows nothing of operators, tensors or what they are for.
"""

from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from unimoe_model.configuration import UniMoEConfig
from unimoe_model.modeling import UniMoEForConditionalGeneration
from unimoe_model.training.forecast.step import BatchShape, simulate_step
from unimoe_model.training.loop import train_stage
from unimoe_model.training.optimization import Optimization
from unimoe_model.training.progress import SilentReporter
from unimoe_model.training.recipe import TrainedPart
from unimoe_model.training.trained import select_trained

MIB = 2**20


def measured_peak(config, train, settings, batch, precision, folder):
    """Peak of the bytes that torch's allocator has given out, over two steps of a stage."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        torch.manual_seed(0)
        model = UniMoEForConditionalGeneration(config)
        parameters = select_trained(model, train)
        model.set_attn_implementation("eager")
        steps = lambda step: batch()  # noqa: E731
        train_stage(
            model, parameters, steps, replace(settings, steps=2), folder, "run", "stage",
            SilentReporter(), precision, checkpoint_seconds=1e9,
        )  # fmt: skip
        del model, parameters
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def text_config(**fields):
    return {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "vocab_size": 500,
        "max_position_embeddings": 2048,
    } | fields


@pytest.fixture
def config(tiny_config):
    def build(text, **fields):
        defaults = {
            "vision_feature_size": 96,
            "vision_num_tokens": 20,
            "media_token_ids": {"image": 490, "video": 491, "speech": 492, "audio": 493},
        }
        return tiny_config(text_config=text_config(**text), **(defaults | fields))

    return build


def batch_of(config, shape, rows, parts=1):
    """Makes a batch of rows that are all as long as the shape says, but one."""

    def make():
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(5, 400, (rows, shape.length), generator=generator)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        batch["labels"] = torch.full_like(ids, -100)
        batch["labels"][:, -shape.answers :] = ids[:, -shape.answers :]
        batch["attention_mask"][-1, -1] = 0
        sizes = {
            "image": (config.vision_num_tokens, config.vision_feature_size),
            "speech": (config.speech_max_frames, config.speech_feature_size),
        }
        end = 1
        for kind, pieces in shape.media.items():
            start, end = end, end + pieces * config.num_soft_tokens(kind)
            ids[:, start:end] = config.media_token_ids[kind]
            batch[f"{kind}_features"] = torch.randn(rows * pieces, *sizes[kind])
        return [{k: v.clone() for k, v in batch.items()} for _ in range(parts)]

    return make


def whole(*parts):
    return tuple(TrainedPart(part) for part in parts)


CASES = {
    "connectors of a dense model": (
        {"num_hidden_layers": 4},
        {"num_experts": 0},
        whole("connectors"),
        BatchShape(120, 20, {"image": 2, "speech": 1}),
        12,
        "fp32",
        {},
    ),
    "lora on experts and attention": (
        {"hidden_size": 96, "intermediate_size": 320},
        {"num_experts": 4},
        (TrainedPart("experts", 8, 16.0), TrainedPart("attention", 8, 16.0), *whole("router")),
        BatchShape(150, 40, {"image": 1}),
        8,
        "fp32",
        {},
    ),
    "bf16, recomputed": (
        {"num_hidden_layers": 6, "hidden_size": 128, "intermediate_size": 256},
        {"num_experts": 0},
        whole("language_model"),
        BatchShape(256, 30),
        6,
        "bf16",
        {"gradient_checkpointing": True},
    ),
    "long rows, large vocabulary": (
        {"vocab_size": 20000, "num_hidden_layers": 2},
        {"num_experts": 0},
        (TrainedPart("ffn", 4, 8.0), *whole("projectors.image")),
        BatchShape(900, 500),
        2,
        "fp32",
        {},
    ),
    "experts whole, bf16": (
        {"hidden_size": 64, "intermediate_size": 224},
        {"num_experts": 4, "moe_layers": "even"},
        whole("experts", "router"),
        BatchShape(180, 20, {"image": 1}),
        8,
        "bf16",
        {},
    ),
    "experts whole, muon": (
        {"hidden_size": 64, "intermediate_size": 224},
        {"num_experts": 2},
        whole("language_model"),
        BatchShape(70, 20, {"image": 1}),
        2,
        "fp32",
        {"muon_learning_rate": 1e-3},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_simulated_peak_is_the_measured_one(case, config, tmp_path):
    text, fields, train, shape, rows, precision, options = CASES[case]
    own = config(text, **fields)
    settings = Optimization(steps=1, batch_size=rows, learning_rate=1e-3, **options)
    measured = measured_peak(own, train, settings, batch_of(own, shape, rows), precision, tmp_path)
    step = simulate_step(own, train, settings, shape, precision, "eager")
    simulated = step.live(rows).sum((1, 2)).max()
    print(case, measured/2**20, simulated/2**20, step.live(rows)[step.live(rows).sum((1,2)).argmax()]/2**20)
    assert simulated == pytest.approx(measured, rel=0.1)
