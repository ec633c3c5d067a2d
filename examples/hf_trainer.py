"""Fine-tunes a Uni-MoE with transformers' `Trainer`: LoRA on its attention and experts.

Run it: python examples/hf_trainer.py --model FOLDER --data FILE --output DIR --steps 100

The losses equal those of `unimoe train` with one stage of the same settings (docs/training.md).
The model is written to DIR/model, for `unimoe generate --model DIR/model`.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

import torch

from unimoe_model.extras import needed_by

with needed_by("transformers' Trainer", "trainer"):
    import accelerate  # noqa: F401
from peft import LoraConfig, PeftModel, get_peft_model
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from unimoe_kernels import add_expert_lora, merge_and_unload_expert_lora
from unimoe_model.configuration import MEDIA_KINDS
from unimoe_model.data.conversation_objects import Conversation
from unimoe_model.data.conversations import Conversations, read_conversations
from unimoe_model.data.mixture import Mixture
from unimoe_model.encoders.outside import choose_encoders
from unimoe_model.modeling import UniMoEForConditionalGeneration
from unimoe_model.precision import resolve_precision
from unimoe_model.processing import UniMoEProcessor
from unimoe_model.training.features import MediaFeatures
from unimoe_model.training.optimization import Optimization, build_optimizers
from unimoe_model.training.progress import own_reporter
from unimoe_model.training.start import own_device
from unimoe_model.training.starting_model import load_whole
from unimoe_model.user_errors import USER_ERRORS
from unimoe_model.value_types import require_at_least, require_positive

ATTENTION = r"model\.language_model\.layers\.\d+\.self_attn\.[qkvo]_proj"


@dataclass
class Collator:
    """Collates inputs and labels of a batch, with features of media that were encoded before."""

    processor: UniMoEProcessor
    features: MediaFeatures
    max_length: int

    def __call__(self, samples: Sequence[Conversation]) -> dict[str, torch.Tensor]:
        """Returns `input_ids`, `attention_mask`, `labels`, and features of each media kind."""
        texts = [self.processor.tokenize(sample.turns) for sample in samples]
        media = {kind: [] for kind in MEDIA_KINDS}
        for kind, path in (item for sample in samples for item in sample.media):
            media[kind].append(self.features.item(kind, path))
        return dict(self.processor.collate(self.processor.rows(texts, media, self.max_length)))


class FiniteLoss(TrainerCallback):
    """Ends training at the first loss that is not finite, before a checkpoint is saved."""

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        """Raises ValueError for a loss that is not finite, naming the step."""
        if not math.isfinite(loss := (logs or {}).get("loss", 0.0)):
            raise ValueError(f"loss of step {state.global_step} ({loss}) must be finite")


def add_lora(model: UniMoEForConditionalGeneration, given: argparse.Namespace) -> PeftModel:
    """Attaches LoRA to attention (peft) and to stacked experts, and freezes everything else."""
    require_at_least(1, rank=given.rank)
    require_positive(alpha=given.alpha)
    if not 0 <= given.dropout < 1:
        raise ValueError(f"dropout ({given.dropout}) must be at least 0 and below 1")
    torch.manual_seed(given.seed + 2)  # as `unimoe train` seeds it
    config = LoraConfig(
        r=given.rank,
        lora_alpha=given.alpha,
        lora_dropout=given.dropout,
        target_modules=ATTENTION,
        task_type="CAUSAL_LM",
    )
    return add_expert_lora(get_peft_model(model, config), given.rank, given.alpha, given.dropout)


def training_arguments(given: argparse.Namespace, settings: Optimization) -> TrainingArguments:
    """The `TrainingArguments`, without optimiser and schedule, which `main` builds."""
    if settings.batch_size % settings.accumulation:
        raise ValueError(
            f"batch_size ({settings.batch_size}) must be a multiple of accumulation"
            f" ({settings.accumulation})"
        )
    require_at_least(1, save_steps=given.save_steps)
    require_at_least(0, seed=given.seed)
    devices = max(torch.cuda.device_count(), int(os.environ.get("WORLD_SIZE", "1")))
    if devices > 1:
        raise ValueError(
            f"devices ({devices}) must be one, which CUDA_VISIBLE_DEVICES chooses; `unimoe train`"
            " divides the work among several"
        )
    # Named activation checkpointing in transformers 5.24 and later.
    known = "activation_checkpointing" in TrainingArguments.__dataclass_fields__
    recomputes = "activation_checkpointing" if known else "gradient_checkpointing"
    return TrainingArguments(
        output_dir=str(given.output),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size // settings.accumulation,
        gradient_accumulation_steps=settings.accumulation,
        max_grad_norm=settings.max_grad_norm,
        bf16=resolve_precision(given.precision, own_device()) == "bf16",
        train_sampling_strategy="sequential",  # `main` puts the data in order
        remove_unused_columns=False,  # the collator reads samples, not columns
        seed=given.seed,
        save_steps=given.save_steps,
        save_total_limit=2,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
        **{recomputes: settings.gradient_checkpointing},
    )


def keep_settings(given: argparse.Namespace, samples: Conversations) -> None:
    """Records the settings that determine the result; resuming requires equal settings."""
    decisive = vars(given) | {"data_digest": samples.digest}
    passed_over = ("output", "resume", "save_steps", "data", "encoders")
    own = {key: str(value) for key, value in decisive.items() if key not in passed_over}
    notes = given.output / "settings.json"
    if notes.exists() != given.resume:
        state = "holds no run to go on with" if given.resume else "holds a run; --resume goes on"
        raise ValueError(f"output ({given.output}) {state}")
    before = json.loads(notes.read_text(encoding="utf-8")) if given.resume else own
    for key, value in own.items():
        if before.get(key) != value:
            raise ValueError(f"{key} ({value}) must be that of the run ({before.get(key)})")
    given.output.mkdir(parents=True, exist_ok=True)
    notes.write_text(json.dumps(own, indent=2), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> Trainer:
    """Trains, and writes the model with merged LoRA to the folder `model` of the output."""
    given = parse(arguments)
    if given.encoders is not None:
        choose_encoders(given.encoders)
    if not (given.model / "config.json").is_file():
        raise ValueError(f"model ({given.model}) must be the folder of a Uni-MoE")
    names = [field.name for field in fields(Optimization)]
    settings = Optimization(**{name: vars(given)[name] for name in names if name in vars(given)})
    options = training_arguments(given, settings)
    samples = read_conversations(given.data, given.media)
    processor = UniMoEProcessor.from_pretrained(given.model)
    base = load_whole(given.model).to(options.device)
    model = add_lora(base, given)
    keep_settings(given, samples)

    # Samples are drawn as in a recipe with one stage, whose seed is 1.
    order = Mixture({"data": samples}, {"data": 1.0}, (given.seed, 1))
    ordered = [s for step in range(settings.steps) for s in order.batch(step, settings.batch_size)]

    # Frozen parts, encoders and bodies of connectors, run once and without dropout.
    precision = "bf16" if options.bf16 else "fp32"
    reporter = own_reporter()
    features = MediaFeatures(
        processor, given.output / "features", options.device, precision, reporter
    )
    media = list(dict.fromkeys(item for sample in ordered for item in sample.media))
    features.prepare(media)
    features.use_query_states(("speech", "audio"), base, media)

    # The model divides its loss by the labels of all parts of a batch (`num_items_in_batch`), but
    # does not divide its router losses, which are added in the backward pass.
    for _, moe in base.moe_layers():
        moe.aux_loss_scale /= settings.accumulation
    # AdamW with betas 0.9 and 0.95, which decays all that is trained; the rate rises from the first
    # step on, and falls to a share of the highest.
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    (optimizer,) = build_optimizers(trained, settings)
    trainer = Trainer(
        model=model,
        args=options,
        train_dataset=ordered,
        data_collator=Collator(
            processor, features, base.config.text_config.max_position_embeddings
        ),
        processing_class=processor,
        optimizers=(optimizer, LambdaLR(optimizer, settings.learning_rate_factor)),
        callbacks=[FiniteLoss()],
    )
    trainer.train(resume_from_checkpoint=given.resume and get_last_checkpoint(given.output))
    trainer.save_state()  # the losses, in trainer_state.json
    merged = merge_and_unload_expert_lora(model).merge_and_unload()
    merged.save_pretrained(given.output / "model")
    processor.save_pretrained(given.output / "model")
    print(f"model in {given.output / 'model'}")
    return trainer


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the parser; options of `Optimization` have its names and defaults."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder of a Uni-MoE, such as runs/mine/model")
    add("--data", type=Path, required=True, help="JSON lines or LLaVA's JSON, see docs/training.md")
    add("--media", type=Path, help="folder of the data's media; default that of the file")
    add("--encoders", type=Path, help="YAML file of encoders to load; permits their code")
    add("--output", type=Path, required=True, help="folder of checkpoints and of the model")
    add("--resume", action="store_true", help="resume from the last checkpoint in the output")
    add("--save-steps", type=int, default=500, help="steps between checkpoints")
    add("--rank", type=int, default=8, help="rank of LoRA")
    add("--alpha", type=float, default=16, help="LoRA is scaled by alpha / rank")
    add("--dropout", type=float, default=0.0, help="dropout of LoRA's input")
    add("--precision", default="auto", help="auto, bf16 or fp32")
    add("--gradient-checkpointing", action="store_true", help="recompute activations")
    add("--seed", type=int, default=0)
    add = parser.add_argument_group("those of a stage in docs/training.md").add_argument
    for field in fields(Optimization):
        if field.type in (int, float, str):
            option, needed = f"--{field.name.replace('_', '-')}", field.default is MISSING
            default = None if needed else field.default
            add(option, type=field.type, required=needed, default=default)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    try:
        main()
    except USER_ERRORS as error:
        sys.exit(f"hf_trainer.py: {error}")
