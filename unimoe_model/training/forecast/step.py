"""Simulation of one training step on fake tensors, and its memory for any number of rows."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from unimoe_kernels import MoE, expert_sort, permute, unpermute, use_backend
from unimoe_model.configuration import UniMoEConfig
from unimoe_model.modeling import UniMoEForConditionalGeneration
from unimoe_model.tokenization import IGNORED
from unimoe_model.training.forecast.allocations import AllocationLog
from unimoe_model.training.forecast.layers import LayerBlocks
from unimoe_model.training.gradients import Objective, add_gradients
from unimoe_model.training.loop import recomputed
from unimoe_model.training.optimization import Optimization, build_optimizers
from unimoe_model.training.ranks import Ranks
from unimoe_model.training.recipe import TrainedPart
from unimoe_model.training.recipe.parts import trains_body
from unimoe_model.training.trained import select_trained

AUDIO_ROWS = 500
"""Feature rows assumed per piece of audio: about 10 s of BEATs."""


@dataclass(frozen=True)
class BatchShape:
    """Shape of a batch with rows of equal length.

    Attributes:
        length: tokens per row, soft tokens included.
        answers: labelled tokens per row.
        media: number of pieces of each media kind in a row; several entries alternate.
    """

    length: int
    answers: int
    media: tuple[dict[str, int], ...] = ({},)


@dataclass(frozen=True)
class Step:
    """Memory of a training step.

    Attributes:
        fixed: live bytes independent of the batch, `[events, kinds, 2]`; see
            `AllocationLog.timeline`.
        per_row: live bytes per row of the batch, `[events, kinds, 2]`.
        layer: bytes of weights and of trained weights of the largest decoder layer, `[2, 2]`; the
            last dimension is without experts, and of experts.
        outside: bytes of weights outside of decoder layers.
        largest: bytes of the largest trained weight.
        trained: bytes of all trained weights.
    """

    fixed: np.ndarray
    per_row: np.ndarray
    layer: np.ndarray
    outside: int
    largest: int
    trained: int

    def live(self, rows: float) -> np.ndarray:
        """Live bytes after each event for a number of rows, `[events, kinds, 2]`."""
        return self.fixed + rows * self.per_row


def simulate_step(
    config: UniMoEConfig,
    train: tuple[TrainedPart, ...],
    settings: Optimization,
    shape: BatchShape,
    precision: str,
    attention: str,
    dispatched: bool = False,
    every_layer: bool = False,
) -> Step:
    """Simulates one training step without memory: forward, backward, clipping and optimiser.

    The functions of the training loop run on CPU operators. The simulated step is the second one,
    in which optimiser states exist. Of identical decoder layers only a few run.

    Args:
        config: configuration of the model.
        train: parts that are trained.
        settings: optimiser and gradient checkpointing; the batch is one part.
        shape: shape of the batch.
        precision: `"bf16"` or `"fp32"`.
        attention: `"eager"`, as on CPUs, or `"sdpa"`, the fused kernel, as on GPUs.
        dispatched: whether experts are split over processes, which adds transferred rows.
        every_layer: whether to run all decoder layers. Always done for Muon, which orthogonalises
            matrices of all layers together.
    """
    log = AllocationLog()
    with torch.device("meta"):
        model = UniMoEForConditionalGeneration(config)
    names = list(select_trained(model, train))
    log.materialize(model)
    model.set_attn_implementation(attention)
    model.requires_grad_(False)
    found = dict(model.named_parameters())
    parameters = {name: found[name].requires_grad_(True) for name in names}
    moes = [part for part in model.modules() if isinstance(part, MoE)]
    experts = {id(p) for moe in moes for p in moe.experts.parameters()}
    for moe in moes if dispatched else ():
        moe.experts.dispatcher = _dispatch
    for own in model.parameters():
        log.mark([own], "weights", id(own) in experts)
    layers = model.model.language_model.layers
    sizes = [_weights(layer, experts) for layer in layers]
    whole = sum(own.nbytes for own in model.parameters())
    prime = _prime(model, shape)
    rows = prime * len(shape.media)
    batch = _batch(log, train, model, shape, rows)
    # Compiled kernels would access memory that fake tensors do not have.
    with use_backend("reference"), log:
        optimizers = build_optimizers(parameters, settings)
        _make_states(log, optimizers, parameters, experts)
        for own in parameters.values():
            own.register_post_accumulate_grad_hook(
                lambda p: log.mark([p.grad], "gradients", id(p) in experts)
            )
        log.forget()
        blocks = LayerBlocks(layers, every_layer or settings.muon_learning_rate is not None)
        blocks.watch(layers, log.events)
        model.train()
        with recomputed(model, settings.gradient_checkpointing):
            add_gradients(model, batch, Objective(precision=precision), Ranks(), "the forecast")
        Ranks().clip(parameters.values(), settings.max_grad_norm)
        for optimizer in optimizers:
            optimizer.step()
    if blocks.is_cut and not blocks.is_whole:
        return simulate_step(
            config, train, settings, shape, precision, attention, dispatched, every_layer=True
        )
    trained = [own.nbytes for own in parameters.values()]
    return Step(
        *log.timeline(rows, prime, blocks if blocks.is_cut else None),
        layer=max(sizes, key=np.sum),
        outside=whole - int(sum(size[0].sum() for size in sizes)),
        largest=max(trained),
        trained=sum(trained),
    )


def _make_states(
    log: AllocationLog,
    optimizers: list[torch.optim.Optimizer],
    parameters: dict[str, nn.Parameter],
    experts: set[int],
) -> None:
    for own in parameters.values():
        own.grad = torch.empty_like(own)
    for optimizer in optimizers:
        optimizer.step()
        for own, state in optimizer.state.items():
            held = [value for value in state.values() if isinstance(value, Tensor)]
            log.mark(held, "optimizer", id(own) in experts)
    for own in parameters.values():
        own.grad = None


def _batch(
    log: AllocationLog,
    train: tuple[TrainedPart, ...],
    model: UniMoEForConditionalGeneration,
    shape: BatchShape,
    rows: int,
) -> dict[str, Tensor]:
    """Inputs and labels; one row is padded, as in nearly all real batches."""
    tokens = model.config.media_token_ids
    ids = torch.full((rows, shape.length), min(set(range(len(tokens) + 1)) - {*tokens.values()}))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch["labels"] = torch.full_like(ids, IGNORED)
    batch["labels"][:, shape.length - shape.answers :] = 0
    batch["attention_mask"][0, -1] = 0
    held: dict[str, int] = {}
    for turn, media in enumerate(shape.media):
        end = 1
        for kind, pieces in media.items():
            start, end = end, end + pieces * model.config.num_soft_tokens(kind)
            ids[turn :: len(shape.media), start:end] = tokens[kind]
            held[kind] = held.get(kind, 0) + pieces * rows // len(shape.media)
    for kind, pieces in held.items():
        name, size = _media(train, model, kind)
        batch[f"{kind}_{name}"] = log.empty(pieces, *size)
    return batch


def _media(
    train: tuple[TrainedPart, ...], model: UniMoEForConditionalGeneration, kind: str
) -> tuple[str, tuple[int, ...]]:
    """Name and shape of the model's input for a piece: query states if the body is frozen."""
    connector = model.model.connector(kind)
    if hasattr(connector, "hidden_states") and not trains_body(train, kind):
        return "query_states", (
            model.config.num_soft_tokens(kind),
            connector.projector.in_features,
        )
    return "features", feature_shape(model.config, kind)


def feature_shape(config: UniMoEConfig, kind: str) -> tuple[int, ...]:
    """Shape of the features of a piece: `speech_max_frames` for speech, `AUDIO_ROWS` for audio."""
    picture = (config.vision_num_tokens, config.vision_feature_size)
    return {
        "image": picture,
        "video": (config.video_num_frames, *picture),
        "speech": (config.speech_max_frames, config.speech_feature_size),
        "audio": (AUDIO_ROWS, config.audio_feature_size),
    }[kind]


def _prime(model: nn.Module, shape: BatchShape) -> int:
    """A prime number that divides no size; see `AllocationLog.timeline`."""
    config = model.config
    sizes = {size for own in model.parameters() for size in own.shape}
    sizes |= {shape.length, shape.length - 1, shape.answers, len(shape.media), AUDIO_ROWS}
    sizes |= {config.speech_max_frames, config.vision_num_tokens, config.video_num_frames}
    return next(p for p in _primes(11) if all(size % p for size in sizes if size > 1))


def _primes(least: int) -> Iterator[int]:
    number = least
    while True:
        if all(number % divisor for divisor in range(2, int(number**0.5) + 1)):
            yield number
        number += 1


def _weights(layer: nn.Module, experts: set[int]) -> np.ndarray:
    """Bytes of weights and of trained weights, without experts and of experts, `[2, 2]`."""
    found = np.zeros((2, 2))
    for own in layer.parameters():
        found[0, int(id(own) in experts)] += own.nbytes
        found[1, int(id(own) in experts)] += own.nbytes * own.requires_grad
    return found


def _dispatch(answer: Callable[..., Tensor], x: Tensor, ids: Tensor, scores: Tensor) -> Tensor:
    """Allocates what `ExpertDispatcher` does if each process receives as many rows as it sends.

    Multiplication by 1 represents a transfer: it allocates the rows in forward and backward.
    """
    sort = expert_sort(ids, int(ids.shape[1]))
    received = permute(x, sort, ids.shape[1]) * 1
    own = torch.zeros_like(received[:, :1], dtype=torch.int32)
    answers = answer(received, own, torch.ones_like(own, dtype=scores.dtype)) * 1
    return unpermute(answers, sort, ids.shape[1], scores)
