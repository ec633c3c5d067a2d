"""Trains a tiny model through all stages: `stage_ranks.py FOLDER RANK WORLD EXPERT SEED [KILL]`.

Prints nothing; leaves the stages in FOLDER/run. With KILL the run ends at that step of stage 3, as
if it had been killed. Without a mesh (WORLD 1 and EXPERT 0) it is one process.
"""

import functools
import sys
from pathlib import Path

import torch
from launcher import write
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperDecoder

from unimoe_kernels.distributed import count_traffic, finish_parallel, start_parallel
from unimoe_model.data.examples import Example, MediaBank, MediaRef
from unimoe_model.data.tokenizer import train_tokenizer
from unimoe_model.training import stages
from unimoe_model.training.optimization import Optimization
from unimoe_model.training.progress import SilentReporter
from unimoe_model.training.settings import ModelSettings, RunSettings, StageSettings

SHAPES = {"image": (9, 1280), "video": (8, 9, 1280), "speech": (6, 16), "audio": (5, 512)}


class KillingReporter(SilentReporter):
    """Ends the run at a step of stage 3."""

    def __init__(self, step):
        self._step, self._stage, self._done = step, None, 0

    def start(self, stage, total, done):
        self._stage, self._done = stage, done

    def advance(self, steps, **figures):
        self._done += steps
        if self._stage == "tune" and self._done == self._step:
            raise KeyboardInterrupt


def stage(steps=3, muon=None, **tasks):
    return StageSettings(Optimization(steps, 6, 0.01, muon_learning_rate=muon), tasks)


def settings():
    return RunSettings(
        seed=0,
        precision="fp32",
        model=ModelSettings(
            text={
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "max_position_embeddings": 128,
            },
            vocab_size=300,
            top_k=2,
            speech_max_frames=6,
            speech_num_queries=4,
            audio_num_queries=2,
            audio_connector={
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 24,
                "hidden_dropout_prob": 0.0,
                "attention_probs_dropout_prob": 0.0,
            },
            load_balancing_coef=0.1,
        ),
        pretrain=stage(muon=0.01, text=1),
        align=stage(image=1, speech=1, audio=1, video=1),
        experts={"image": stage(image=1, speech=1), "audio": stage(audio=1)},
        router_strength=3.0,
        tune=stage(steps=6, image=1, audio=1, text=1),
        expert_lora_rank=3,
        expert_lora_alpha=6,
        lora_rank=2,
        lora_alpha=4,
    )


def tasks_and_bank():
    generator = torch.Generator().manual_seed(0)
    bank, tasks = MediaBank(), {"text": [Example("text", "a circle is red?", "yes")]}
    for kind, shape in SHAPES.items():
        bank.add(f"{kind}s", kind, torch.randn(4, *shape, generator=generator).half())
        tasks[kind] = [
            Example(kind, f"what shape {i}?", str(i), (MediaRef(kind, f"{kind}s", i),))
            for i in range(4)
        ]
    return tasks, bank


def speech_decoder():
    torch.manual_seed(5)
    config = WhisperConfig(
        d_model=16,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=24,
        max_target_positions=8,
        vocab_size=20,
        pad_token_id=0,
        dropout=0.0,
    )
    return WhisperDecoder(config)


def main(folder, rank, world, expert, kill=0):
    torch.set_num_threads(1)
    # Steps of AdamW and Muon enlarge rounding: float32 says little after a few of them.
    torch.set_default_dtype(torch.float64)
    mesh = None
    if expert:
        mesh = start_parallel(
            world // expert,
            expert,
            timeout=60,
            init_method=f"file://{folder}/store-{world}-{expert}-{kill}",
            rank=rank,
            world_size=world,
        )
    stages.train_stage = functools.partial(stages.train_stage, checkpoint_seconds=-1.0)
    tokenizer = train_tokenizer(["what shape is it? a red circle", "which word? yes no"] * 3, 300)
    reporter = KillingReporter(kill) if kill else SilentReporter()
    trainer = stages.Trainer(
        settings(),
        "moe",
        folder / "run",
        folder / "base",
        *tasks_and_bank(),
        tokenizer,
        speech_decoder(),
        reporter,
        torch.device("cpu"),
        mesh,
    )
    with count_traffic() as traffic:
        try:
            trainer.run()
        except KeyboardInterrupt:
            return
    finish_parallel()
    write(folder, rank, {"sent": traffic.sent})


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
