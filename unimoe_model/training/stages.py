"""The stages in order: pretrain the LLM, align, train experts, assemble and tune.

The dense arm goes through the same stages with one FFN of width `top_k * F`, which does as many
FLOPs a token as the experts of the MoE arm. In stage 2 it is trained on the very batches that the
experts are trained on, taken in turn.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedTokenizerFast

from unimoe_model.configuration import MEDIA_KINDS
from unimoe_model.data.collate import Collator
from unimoe_model.data.examples import Example, MediaBank
from unimoe_model.data.feature_cache import FeatureCache
from unimoe_model.data.mixture import Mixture
from unimoe_model.modeling import UniMoEForConditionalGeneration
from unimoe_model.tensor_files import save_tensors
from unimoe_model.training.assemble import (
    FFN_LORA,
    add_lora,
    assemble_moe,
    ffn_state,
    lora_parameters,
    merge_and_unload_lora,
)
from unimoe_model.training.base import dense_config, widen_ffns
from unimoe_model.training.checkpoint import completed_run, fingerprint
from unimoe_model.training.language_model import digest, load_language_model
from unimoe_model.training.loop import finish_stage, train_stage
from unimoe_model.training.progress import ProgressReporter
from unimoe_model.training.query_states import CACHED_KINDS, query_state_bank
from unimoe_model.training.ranks import Ranks
from unimoe_model.training.router_start import mean_ffn_inputs, router_weights
from unimoe_model.training.settings import RunSettings, StageSettings

ARMS = ("moe", "dense")
STAGES = ("pretrain", "align", "experts", "tune")
TRAINED = "trained.safetensors"
ROUTER_START_BATCHES = 4


class Trainer:
    """Takes one arm through all stages; what is done already is loaded instead of done again.

    Args:
        settings: what to train.
        arm: `"moe"` or `"dense"`.
        folder: one folder a stage is made in it.
        base_folder: where stage 1 is made that all arms share, if the settings name a
            `language_model`.
        tasks: training examples by task.
        bank: features of their media.
        tokenizer: the LLM's tokenizer.
        speech_decoder: pretrained Whisper decoder weights that the speech connector starts from.
        reporter: is told of the progress.
        device: where to train.
        mesh: of the processes that train together (`start_ranks`), each of which makes its own
            Trainer with the same arguments; None is this process alone.

    Raises:
        ValueError: If arm is unknown, or a stage of the settings needs a task without examples.
    """

    def __init__(
        self,
        settings: RunSettings,
        arm: str,
        folder: Path,
        base_folder: Path,
        tasks: Mapping[str, Sequence[Example]],
        bank: MediaBank,
        tokenizer: PreTrainedTokenizerFast,
        speech_decoder: nn.Module,
        reporter: ProgressReporter,
        device: torch.device,
        mesh: DeviceMesh | None = None,
    ):
        if arm not in ARMS:
            raise ValueError(f"arm ({arm!r}) must be one of {ARMS}")
        self._settings = settings
        self._arm = arm
        self._folder = folder
        self._base_folder = folder if settings.language_model is None else base_folder
        self._tasks = tasks
        self._bank = bank
        self.tokenizer = tokenizer
        self._speech_decoder = speech_decoder
        self._reporter = reporter
        self._device = device
        self._ranks = Ranks(mesh)
        self._precision = settings.resolved_precision(device)
        stages = (settings.align, *settings.experts.values(), settings.tune)
        for stage in (*stages, settings.pretrain) if settings.pretrain else stages:
            Mixture(tasks, stage.tasks, seed=(settings.seed,))
        self._digests: dict[str, str] = {}
        words = fingerprint(tokenizer.get_vocab())
        llm = settings.language_model
        source = arm if llm is None else digest(Path(llm))
        sizes = asdict(settings.model)
        self._origin = (source, self._precision, sizes, settings.seed, words)
        self._history: list = []
        self._aligned_run = ""

    def run(self) -> UniMoEForConditionalGeneration:
        """Trains (or loads) everything and returns the tuned model, LoRA merged."""
        model = self.align()
        if self._settings.language_model is not None:
            self._history.append(self._arm)
            if self._arm == "dense":
                model = widen_ffns(model, self._settings.model.top_k)
                self._set_attention(model)
        bank = self.query_states(model)
        collator = Collator(self.tokenizer, model.config, bank, query_states=CACHED_KINDS)
        if self._arm == "dense":
            self._experts_in_one(model, collator)
        else:
            model = self._experts(model, collator)
        return self._tune(model, collator)

    def align(self) -> UniMoEForConditionalGeneration:
        """Pretrains (or loads) the LLM, then trains the connectors: stage 1.

        With a `language_model` this is the same for both arms.
        """
        settings = self._settings
        self._history = list(self._origin)
        torch.manual_seed(settings.seed)
        text = dict(settings.model.text)
        if settings.language_model is None and self._arm == "dense":
            text["intermediate_size"] *= settings.model.top_k
        config = dense_config(settings.model, text, self.tokenizer, self._speech_decoder)
        model = UniMoEForConditionalGeneration(config)
        model.model.speech_connector.load_decoder(self._speech_decoder.state_dict())
        if settings.language_model is not None:
            load_language_model(model, Path(settings.language_model))
        model.to(self._device)
        self._set_attention(model)
        collator = Collator(self.tokenizer, model.config, self._bank)
        if settings.pretrain is not None:
            parameters = _named(model, lambda name: "_connector." not in name)
            batches = self._batches(settings.pretrain, 0, collator)
            self._stage("pretrain", model, parameters, batches, settings.pretrain)
        parameters = _named(model, lambda name: "_connector." in name)
        batches = self._batches(settings.align, 1, collator)
        self._stage("align", model, parameters, batches, settings.align, self._base_folder)
        self._aligned_run = fingerprint(self._history)
        return model

    def query_states(
        self, model: UniMoEForConditionalGeneration, sources: Collection[str] | None = None
    ) -> MediaBank:
        """The bank with query states in place of speech features; see `query_state_bank`."""
        cache = FeatureCache(self._base_folder / "query_states")
        return query_state_bank(model, self._bank, cache, self._aligned_run, sources)

    def _experts(
        self, model: UniMoEForConditionalGeneration, collator: Collator
    ) -> UniMoEForConditionalGeneration:
        aligned = {k: v.clone() for k, v in model.state_dict().items()}
        experts, connectors, means = {}, {}, []
        history = list(self._history)
        for number, (kind, stage) in enumerate(self._settings.experts.items()):
            self._history = list(history)
            model.load_state_dict(aligned)
            own = _named(model, lambda name, kind=kind: _is_own_connector(name, kind))
            batches = self._batches(stage, 2 + number, collator)
            self._expert_stage(f"experts/{kind}", model, own, batches, stage)
            experts[kind] = ffn_state(model)
            connectors |= {name: p.detach().clone() for name, p in own.items()}
            whole = self._batches(stage, 2 + number, collator, shared=False)
            means.append(mean_ffn_inputs(model, map(whole, range(ROUTER_START_BATCHES))))
        self._history = [
            *history,
            [asdict(s) for s in self._settings.experts.values()],
            self._settings.router_strength,
        ]
        model.load_state_dict(aligned | connectors)
        torch.manual_seed(self._settings.seed + 1)
        moe = assemble_moe(
            model,
            experts,
            self._settings.model.top_k,
            moe_layers=self._settings.model.moe_layers,
            load_balancing_coef=self._settings.model.load_balancing_coef,
        )
        self._set_attention(moe)
        if self._settings.router_strength:
            weights = router_weights(torch.stack(means), self._settings.router_strength)
            with torch.no_grad():
                for index, layer in moe.moe_layers():
                    layer.router.weight.copy_(weights[index])
        return moe

    def _experts_in_one(self, model: UniMoEForConditionalGeneration, collator: Collator) -> None:
        streams = [
            self._batches(stage, 2 + number, collator)
            for number, stage in enumerate(self._settings.experts.values())
        ]
        own = _named(
            model,
            lambda name: any(_is_own_connector(name, kind) for kind in self._settings.experts),
        )
        first = next(iter(self._settings.experts.values()))
        steps = first.optimizer.steps * len(streams)
        tasks = {k: w for s in self._settings.experts.values() for k, w in s.tasks.items()}
        stage = StageSettings(_with_steps(first.optimizer, steps), tasks)
        self._expert_stage(
            "experts",
            model,
            own,
            lambda step: streams[step % len(streams)](step // len(streams)),
            stage,
        )

    def _expert_stage(
        self,
        name: str,
        model: UniMoEForConditionalGeneration,
        connectors: dict[str, nn.Parameter],
        batch_of: Callable[[int], dict[str, torch.Tensor]],
        stage: StageSettings,
    ) -> None:
        """Trains LoRA on the FFNs together with some connector parameters, and merges it."""
        settings = self._settings
        torch.manual_seed(settings.seed + 3)
        add_lora(model, settings.expert_lora_rank, settings.expert_lora_alpha, FFN_LORA)
        model.to(self._device)
        self._stage(name, model, lora_parameters(model) | connectors, batch_of, stage)
        merge_and_unload_lora(model)

    def _tune(
        self, model: UniMoEForConditionalGeneration, collator: Collator
    ) -> UniMoEForConditionalGeneration:
        settings = self._settings
        torch.manual_seed(settings.seed + 2)
        add_lora(model, settings.lora_rank, settings.lora_alpha)
        model.to(self._device)
        parameters = lora_parameters(model) | _named(
            model,
            lambda name: (
                ".router." in name or any(_is_projector(name, k) for k in settings.experts)
            ),
        )
        self._history += [settings.lora_rank, settings.lora_alpha]
        batches = self._batches(settings.tune, 2 + len(MEDIA_KINDS), collator)
        self._stage("tune", model, parameters, batches, settings.tune)
        merge_and_unload_lora(model)
        model.set_attn_implementation("sdpa")
        return model.requires_grad_(False).eval()

    def _set_attention(self, model: UniMoEForConditionalGeneration) -> None:
        """Trains with plain matmuls on CPUs.

        The backward of torch's fused attention takes 14 ms a layer there on 64 texts of 31 tokens,
        the one of matmuls and softmax under 1 ms.
        """
        model.set_attn_implementation("eager" if self._device.type == "cpu" else "sdpa")

    def _batches(
        self, stage: StageSettings, number: int, collator: Collator, shared: bool = True
    ) -> Callable[[int], dict[str, torch.Tensor]]:
        """Batches by step: this process's share of them, or the whole."""
        mixture = Mixture(self._tasks, stage.tasks, seed=(self._settings.seed, number))
        size = stage.optimizer.batch_size
        share = self._ranks.share if shared else list
        return lambda step: collator.training(share(mixture.batch(step, size)))

    def _digest(self, task: str) -> str:
        if task not in self._digests:
            examples = [(e.question, e.answer, e.media) for e in self._tasks[task]]
            self._digests[task] = fingerprint(examples)
        return self._digests[task]

    def _stage(
        self,
        name: str,
        model: nn.Module,
        parameters: dict[str, nn.Parameter],
        batch_of: Callable[[int], dict[str, torch.Tensor]],
        stage: StageSettings,
        parent: Path | None = None,
    ) -> None:
        self._history.append([name, asdict(stage), [self._digest(task) for task in stage.tasks]])
        run = fingerprint(self._history)
        folder = (parent or self._folder) / name
        if completed_run(folder, run):
            _load_trained(folder / TRAINED, parameters)
            return
        folder.mkdir(parents=True, exist_ok=True)
        progress = train_stage(
            model,
            parameters,
            batch_of,
            stage.optimizer,
            folder,
            run,
            name,
            self._reporter,
            self._precision,
            ranks=self._ranks,
        )
        if self._ranks.is_first:
            found = dict(model.named_parameters())
            weights = {name: found[name].detach().cpu().contiguous() for name in parameters}
            save_tensors(folder / TRAINED, weights)
            finish_stage(folder, run, stage.optimizer, progress)
        self._ranks.wait(f"end of {name}")


def _named(model: nn.Module, wanted: Callable[[str], bool]) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if wanted(name)}


def _is_own_connector(name: str, kind: str) -> bool:
    """Whether stage 2 trains this connector parameter with the expert of `kind`.

    Pictures and videos share a connector, so neither expert may change it under the other. The
    speech connector's body stays as stage 1 left it, so that it runs only once.
    """
    if kind == "speech":
        return _is_projector(name, kind)
    return kind == "audio" and ".audio_connector." in name


def _is_projector(name: str, kind: str) -> bool:
    return f".{kind}_connector.projector." in name


def _with_steps(settings, steps: int):
    return type(settings)(**{**asdict(settings), "steps": steps})


def _load_trained(path: Path, parameters: dict[str, nn.Parameter]) -> None:
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}); delete its folder to train the stage anew"
        ) from error
    if weights.keys() != parameters.keys():
        raise ValueError(f"{path} holds other parameters than this run trains; delete its folder")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
