"""Statistics of the experts that tokens of each modality are routed to, layer by layer."""

from collections.abc import Mapping
from contextlib import contextmanager

import torch

from unimoe_model.llm_families import has_own_experts
from unimoe_model.modality import MODALITIES, modality_ids_of


@contextmanager
def recorded_routing(model, on_device: bool = False):
    """Records the selected experts of every MoE layer while the context is open.

    Args:
        model: MoE model.
        on_device: whether to keep ids on the model's device, which avoids synchronisation.

    Yields:
        A dict from layer index to a list of int32 id tensors `[T, K]`, one per forward pass.
    """
    chosen: dict[int, list[torch.Tensor]] = {index: [] for index, _ in model.moe_layers()}
    hooks = [
        moe.router.register_forward_hook(
            lambda _module, _inputs, routed, kept=chosen[index]: kept.append(
                routed.ids.detach() if on_device else routed.ids.cpu()
            )
        )
        for index, moe in model.moe_layers()
    ]
    try:
        yield chosen
    finally:
        for hook in hooks:
            hook.remove()


class RoutingCounts:
    """Accumulates the number of routed rows per expert, layer and modality over batches.

    Args:
        model: MoE model in eval mode.

    Attributes:
        layers: indices of the decoder layers with experts.
        tokens: number of tokens of each modality so far, without padding.

    Raises:
        ValueError: If the model has no layers whose FFN was replaced by experts.
    """

    def __init__(self, model):
        self._model = model
        self.layers = [index for index, _ in model.moe_layers()]
        if not self.layers:
            llm = model.config.text_config.model_type
            raise ValueError(
                f"model must have MoE layers of a Uni-MoE; this one has only those of {llm}"
                if has_own_experts(model.config.text_config)
                else "model must have MoE layers; this one is dense, so nothing is routed"
            )
        shape = (len(self.layers), model.config.num_experts)
        self._taken = {modality: torch.zeros(shape, dtype=torch.int64) for modality in MODALITIES}
        self.tokens = dict.fromkeys(MODALITIES, 0)

    @torch.inference_mode()
    def add(self, inputs: Mapping[str, torch.Tensor]) -> None:
        """Runs a batch through the model and adds its routed rows.

        Args:
            inputs: `input_ids` and `attention_mask` `[B, S]`, and features of the media.
        """
        on_device = {name: tensor.to(self._model.device) for name, tensor in inputs.items()}
        with recorded_routing(self._model) as chosen:
            self._model.hidden_states(**on_device)
        kinds = modality_ids_of(
            inputs["input_ids"],
            self._model.config.media_token_ids,
            inputs["attention_mask"].bool(),
        )
        for index, modality in enumerate(MODALITIES):
            mask = kinds == index
            self.tokens[modality] += int(mask.sum())
            taken = self._taken[modality]
            for row, layer in enumerate(self.layers):
                ids = chosen[layer][0][mask.flatten()].flatten().long()
                # Ids beyond the experts are null experts and dropped choices.
                taken[row] += torch.bincount(ids[ids < taken.shape[1]], minlength=taken.shape[1])

    def taken(self) -> dict[str, torch.Tensor]:
        """Routed rows of every expert, `[layers, E]` int64, for each modality that occurs."""
        return {kind: rows for kind, rows in self._taken.items() if self.tokens[kind]}

    def shares(self) -> dict[str, torch.Tensor]:
        """Each expert's share of the routed rows of a modality.

        Returns:
            For each modality that occurs, `[layers, E]` float64; rows sum to one.
        """
        return {
            modality: taken.double() / taken.sum(1, keepdim=True).clamp(min=1)
            for modality, taken in self.taken().items()
        }
