"""Construction of the model that a stage trains: loading, widening of FFNs, assembly of experts."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from unimoe_model.checkpoints.files import TensorFiles, shards
from unimoe_model.checkpoints.names import DECODER_LAYERS
from unimoe_model.modeling import UniMoEForConditionalGeneration
from unimoe_model.training.assemble import FFN_NAMES, assemble_moe, ffn_state
from unimoe_model.training.recipe import START, Recipe, Stage
from unimoe_model.training.router_start import mean_ffn_inputs, router_weights
from unimoe_model.training.starting_model import load_whole
from unimoe_model.training.widening import widen_ffns

ROUTER_BATCHES = 4
"""Number of batches of an expert's stage whose mean hidden states initialise its router weights."""


def stage_model(
    recipe: Recipe,
    stage: Stage,
    start: Callable[[], UniMoEForConditionalGeneration],
    folders: Mapping[str, Path],
    batch_of: Callable[[str, int], dict],
    device: torch.device,
) -> UniMoEForConditionalGeneration:
    """Builds the model of a stage before training, in float32 on `device`.

    Args:
        recipe: the recipe, which has the seed.
        stage: the stage.
        start: builds the model that the recipe starts from.
        folders: model folders of completed stages, by name.
        batch_of: returns the whole batch of a stage and step, to initialise the router.
        device: device to train on.

    Raises:
        ValueError: If several expert stages trained the same weights outside of their FFNs, and
            the stage does not select one of them.
    """
    model = load_whole(folders[stage.parent]) if stage.parent in folders else start()
    if stage.widen > 1:
        model = widen_ffns(model, stage.widen)
    if stage.assembly is not None:
        model = _assembled(recipe, stage, model, start, folders)
        if stage.assembly.router_strength:
            _start_router(stage, model, folders, batch_of, device)
    return model.to(device)


def _assembled(
    recipe: Recipe,
    stage: Stage,
    model: UniMoEForConditionalGeneration,
    start: Callable[[], UniMoEForConditionalGeneration],
    folders: Mapping[str, Path],
) -> UniMoEForConditionalGeneration:
    assembly = stage.assembly
    experts = {
        name: _ffn_state(folders[name]) if name in folders else ffn_state(start())
        for name in dict.fromkeys(assembly.experts)
    }
    state = model.state_dict()
    kept = kept_parts(recipe, stage, state)
    for origin in dict.fromkeys(kept.values()):
        for name, tensor in _tensors(folders[origin], lambda name, o=origin: kept.get(name) == o):
            state[name].copy_(tensor)
    torch.manual_seed(recipe.seed + 1)
    ffns = {f"{name} {i}": experts[name] for i, name in enumerate(assembly.experts)}
    return assemble_moe(
        model,
        ffns,
        assembly.top_k,
        moe_layers=assembly.layers,
        expert_origins=list(assembly.experts),
        **assembly.options,
    )


def kept_parts(recipe: Recipe, stage: Stage, names: Iterable[str]) -> dict[str, str]:
    """The stages from which weights outside of FFNs are taken, where it is not the parent.

    A weight is that of the expert which trained it, in its own stage or in one that it starts from
    and the parent does not.

    Args:
        recipe: the recipe with the stages of the experts.
        stage: stage with an `assembly`.
        names: names of the parent's weights.

    Returns:
        Stage by weight name.

    Raises:
        ValueError: If experts, or the parent and an expert, trained a weight in different stages,
            and the recipe does not select one of them.
    """
    chosen = {f"model.{kind}_connector.": name for kind, name in stage.assembly.connectors.items()}
    parents = list(_lineage(recipe, stage.parent))
    lineages = {name: list(_lineage(recipe, name)) for name in stage.assembly.experts}
    kept = {}
    for name in names:
        if _is_ffn(name):
            continue
        origins = [own for prefix, own in chosen.items() if name.startswith(prefix)]
        origins = origins or _trained_by(name, stage.parent, parents, lineages)
        if len(origins) > 1:
            raise ValueError(
                f"stages.{stage.name}.assemble: stages {origins[0]} and {origins[1]} both train"
                f" {name}; connectors must select one of them, such as {{image: {origins[1]}}}, and"
                " only connectors can be trained by several"
            )
        if origins and origins[0] != stage.parent:
            kept[name] = origins[0]
    return kept


def _lineage(recipe: Recipe, name: str) -> Iterator[Stage]:
    """A stage and those that it starts from, the last one first."""
    while name != START:
        stage = recipe.stage(name)
        yield stage
        name = stage.parent


def _trained_by(
    name: str, parent: str, parents: Sequence[Stage], lineages: Mapping[str, Sequence[Stage]]
) -> list[str]:
    """Experts whose value of a weight is not the parent's or an older one, each value once.

    The parent is among them if it trained the weight where they did not.
    """
    found: dict[str, str] = {}
    first = _last_trained(name, parents)
    for expert, lineage in lineages.items():
        last = _last_trained(name, lineage)
        if last is None or last in parents:
            continue
        found.setdefault(last.name, expert)
        if first is not None and first not in lineage:
            found.setdefault(first.name, parent)
    return list(found.values())


def _last_trained(name: str, lineage: Sequence[Stage]) -> Stage | None:
    """The last stage that trained a weight."""
    for stage in lineage:
        if any(part.matches(name) for part in stage.train):
            return stage
    return None


def _ffn_state(folder: Path) -> dict[str, torch.Tensor]:
    """Reads the FFN weights of an expert for `assemble_moe` from a model folder."""
    return {
        name.removeprefix(DECODER_LAYERS).replace(".mlp.", "."): tensor
        for name, tensor in _tensors(folder, _is_ffn)
    }


def _is_ffn(name: str) -> bool:
    own = tuple(f".mlp.{projection}.weight" for projection in FFN_NAMES)
    return name.startswith(DECODER_LAYERS) and name.endswith(own)


def _tensors(folder: Path, wanted: Callable[[str], bool]):
    files = TensorFiles(shards(folder))
    return ((name, files.read(name).float()) for name in files.meta if wanted(name))


def _start_router(
    stage: Stage,
    model: UniMoEForConditionalGeneration,
    folders: Mapping[str, Path],
    batch_of: Callable[[str, int], dict],
    device: torch.device,
) -> None:
    means = []
    for expert in stage.assembly.experts:
        if expert not in folders:
            raise ValueError(
                f"stages.{stage.name}.assemble: router_strength must be 0 with the expert"
                f" {expert!r}, which has no data of its own"
            )
        dense = load_whole(folders[expert]).to(device)
        batches = (batch_of(expert, step) for step in range(ROUTER_BATCHES))
        means.append(mean_ffn_inputs(dense, batches))
    weights = router_weights(torch.stack(means), stage.assembly.router_strength)
    with torch.no_grad():
        for index, layer in model.moe_layers():
            # Rows after those of the experts are of null and shared experts: a logit of 0.
            layer.router.weight.zero_()[: weights.shape[1]].copy_(weights[index])
