"""Which experts the tokens of each modality go to, layer by layer."""

from collections.abc import Mapping
from contextlib import contextmanager

import torch

from unimoe_model.llm_families import has_own_experts
from unimoe_model.modality import MODALITIES, modality_ids_of


@contextmanager
def recorded_routing(model, on_device: bool = False):
    """Collects the chosen experts of every MoE layer while the context is open.

    Args:
        model: MoE model.
        on_device: whether ids stay on the model's device, which waits for no copy.

    Yields:
        A dict from layer number to a list of id tensors `[T, K]`, one a forward pass.
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
    """Adds up, batch by batch, how many tokens of each modality every expert takes.

    Attributes:
        layers: numbers of the decoder layers that hold experts.
        tokens: tokens of each modality seen so far, padding not counted.

    Args:
        model: MoE model in eval mode.

    Raises:
        ValueError: If no FFN of the model's LLM was made into experts.
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
        """Runs a batch through the model and counts.

        Args:
            inputs: `input_ids` and `attention_mask` `[B, S]`, and the media's features.
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
                # Ids past the experts stand for null experts and choices given up.
                taken[row] += torch.bincount(ids[ids < taken.shape[1]], minlength=taken.shape[1])

    def taken(self) -> dict[str, torch.Tensor]:
        """Routed rows of every expert, `[layers, E]` int64, for each modality that occurs."""
        return {kind: rows for kind, rows in self._taken.items() if self.tokens[kind]}

    def shares(self) -> dict[str, torch.Tensor]:
        """Share of each modality's routed rows that every expert takes.

        Returns:
            For each modality that occurs, `[layers, E]` float64; every row sums to one (each token
            counts once for each of its K experts, divided by K).
        """
        return {
            modality: taken.double() / taken.sum(1, keepdim=True).clamp(min=1)
            for modality, taken in self.taken().items()
        }
