"""Trains a recipe in float64: `stage_ranks.py FOLDER RANK WORLD LAYOUT RECIPE [STAGE STEP]`.

LAYOUT is the number of processes that share the experts, with `-shard` behind it for FSDP2.

Leaves the stages in FOLDER/run. With STAGE and STEP it makes a checkpoint after every step, and
kills itself at that one, before its checkpoint.
"""

import os
import signal
import sys
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from launcher import write
from torch.utils.checkpoint import checkpoint
from transformers import modeling_utils

sys.path.append(str(Path(__file__).parent.parent / "model"))
from wide import Wide

from unimoe_kernels.distributed import count_traffic, finish_parallel, start_parallel
from unimoe_model.encoders.outside import permit_encoder
from unimoe_model.modeling import UniMoEForConditionalGeneration
from unimoe_model.training import stage_model, starting_model
from unimoe_model.training.progress import SilentReporter
from unimoe_model.training.recipe import load_recipe
from unimoe_model.training.recipe_data import RecipeData
from unimoe_model.training.run import Run


class Reporter(SilentReporter):
    """Keeps the step at which each stage began, and kills its process at a step of a stage."""

    def __init__(self, *end):
        self.began = {}
        self._end, self._stage, self._done = end, None, 0

    def start(self, stage, total, done):
        self._stage = stage
        self.began[stage] = self._done = done

    def advance(self, steps, **figures):
        self._done += steps
        if (self._stage, self._done) == self._end:
            os.kill(os.getpid(), signal.SIGKILL)


def _load_whole(folder):
    return UniMoEForConditionalGeneration.from_pretrained(folder, dtype=torch.float64)


@contextmanager
def in_float64():
    """Steps of AdamW and Muon enlarge rounding: float32 says little after a few of them."""
    own = torch.get_default_dtype()
    patches = [patch.object(m, "load_whole", _load_whole) for m in (starting_model, stage_model)]
    # Activations are recomputed in the backward, where the mode is off.
    recomputed = partial(checkpoint, context_fn=lambda: (nullcontext(), Wide()))
    patches.append(patch.object(modeling_utils, "checkpoint", recomputed))
    torch.set_default_dtype(torch.float64)
    try:
        with patches[0], patches[1], patches[2], Wide():
            yield
    finally:
        torch.set_default_dtype(own)


def train(folder, path, *end, mesh=None, parallel=None):
    """Trains all stages of the recipe `path`; `end` is the STAGE and STEP at which it dies."""
    recipe = load_recipe(path, checkpoint_seconds=0.0 if end else 600.0, parallel=parallel)
    for name in recipe.encoder_names:
        permit_encoder(name, path.parent)
    reporter, device = Reporter(*end), torch.device("cpu")
    places = folder / "run", folder / "features"
    run = Run(recipe, RecipeData(recipe), *places, reporter, device, mesh)
    run.encode()
    with in_float64(), count_traffic() as traffic:
        run.train([stage.name for stage in recipe.stages])
    return {"sent": traffic.sent, "began": reporter.began}


def main(folder, rank, world, layout, path, *end):
    torch.set_num_threads(1)
    expert, _, shard = layout.partition("-")
    expert = int(expert)
    parallel = {"data": world // expert, "expert": expert, "shard": bool(shard)}
    mesh = start_parallel(
        world // expert,
        expert,
        timeout=60,
        init_method=f"file://{folder}/store-{world}-{layout}-{len(end)}",
        rank=rank,
        world_size=world,
    )
    found = train(folder, path, *end, mesh=mesh, parallel=parallel)
    finish_parallel()
    write(folder, rank, found)


if __name__ == "__main__":
    own, rank, world, layout, path = sys.argv[1:6]
    end = [sys.argv[6], int(sys.argv[7])] if len(sys.argv) > 6 else []
    main(Path(own), int(rank), int(world), layout, Path(path), *end)
