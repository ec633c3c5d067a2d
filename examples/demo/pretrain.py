"""Trains the small language model that the demo starts from, on text alone.

Example:
    python -m examples.demo.pretrain --output runs/language_model
"""

import argparse
import shutil
import sys
from pathlib import Path

import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from examples.demo.data import write_text_tasks
from examples.demo.exit_code import exit_code_of
from examples.demo.settings import language_model_recipe
from unimoe_kernels import replace_folder
from unimoe_model.checkpoints.writing import refuse_existing
from unimoe_model.processing import UniMoEProcessor
from unimoe_model.training.command import train_recipe
from unimoe_model.training.starting_model import load_whole


def pretrain(output: Path, seed: int = 0) -> None:
    """Trains a tokenizer and a LLaMA by the recipe `full.yaml`, and saves them in float16.

    An interrupted run resumes from its last checkpoint, in `<output>.training`.

    Args:
        output: folder in the layout of transformers; must not exist yet.
        seed: seed of weights and data order.

    Raises:
        ValueError: If the folder exists.
        MissingAssetError: If a package of the demo's data is not installed.
    """
    refuse_existing(output)
    training = output.with_name(f"{output.name}.training")
    names = write_text_tasks(training / "data", seed)
    recipe = training / "recipe.yaml"
    text = yaml.safe_dump(language_model_recipe(names), sort_keys=False, width=100)
    recipe.write_text(text, encoding="utf-8")
    model = train_recipe(recipe, training / "run", seed=seed)
    made = training / "language_model"
    _save(model, made)
    replace_folder(output, made)
    shutil.rmtree(training)


def _save(model: Path, folder: Path) -> None:
    """Writes the LLaMA of a Uni-MoE, and its tokenizer."""
    whole = load_whole(model)
    llama = LlamaForCausalLM(LlamaConfig.from_dict(whole.config.text_config.to_dict()))
    llama.model.load_state_dict(whole.model.language_model.state_dict())
    llama.lm_head.load_state_dict(whole.lm_head.state_dict())
    llama.to(torch.float16).save_pretrained(folder)
    UniMoEProcessor.from_pretrained(model).tokenizer.save_pretrained(folder)


def main() -> int:
    """Runs the command; user errors are printed as one line on stderr."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the language model")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    options = parser.parse_args()
    return exit_code_of("pretrain", lambda: pretrain(options.output, options.seed))


if __name__ == "__main__":
    sys.exit(main())
