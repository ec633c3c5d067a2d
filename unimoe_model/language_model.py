"""The LLM of Uni-MoE: a transformers decoder with MoE layers as configured."""

import functools

import torch
from torch import nn
from transformers import MODEL_MAPPING, PreTrainedModel
from transformers import initialization as init

from unimoe_kernels import (
    GroupedExperts,
    MoE,
    TopKRouter,
    inject_aux_loss,
    register_with_transformers,
)
from unimoe_model.configuration import UniMoEConfig
from unimoe_model.llm_families import expert_activation, has_own_experts
from unimoe_model.modality import ModalityGate, modality_expert_loss, modality_kl_loss


def build_language_model(config: UniMoEConfig) -> PreTrainedModel:
    """Builds the decoder of an LLM, without its head, with MoE layers as configured.

    The model is an instance of the transformers class or, with experts, of a subclass with the
    same parameters outside the MoE layers. An LLM with experts of its own runs them with the
    implementation `"unimoe"` unless its configuration selects another.
    """
    text = config.text_config
    family = MODEL_MAPPING[type(text)]
    if has_own_experts(text) and text._experts_implementation is None:
        register_with_transformers()
        text._experts_implementation = "unimoe"
    return _with_experts(family)(config) if config.num_experts else family(text)


class _ExpertsInLayers:
    """Replaces decoder layers of an LLM by MoE layers and initialises them.

    In transformers each `PreTrainedModel` initialises its own modules, so the weights of experts
    are initialised here and not by the surrounding model.
    """

    def __init__(self, config: UniMoEConfig):
        super().__init__(config.text_config)
        for index, layer in enumerate(self.layers):
            if config.is_moe_layer(index):
                self.layers[index] = _with_moe(type(layer))(config, index)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal(0, initializer_range) for linear maps, experts, router and embeddings."""
        super()._init_weights(module)
        # For models outside its own package, transformers calls this only for modules with direct
        # parameters, which an MoE does not have.
        if isinstance(module, TopKRouter | GroupedExperts):
            for parameter in module.parameters(recurse=False):
                init.normal_(parameter, std=self.config.initializer_range)


class _MoELayer:
    """Decoder layer whose FFN is an MoE layer; padding is excluded from router losses.

    Router losses are injected: they contribute to gradients, but not to the reported loss.
    """

    def __init__(self, config: UniMoEConfig, layer_idx: int):
        super().__init__(config.text_config, layer_idx)
        text = config.text_config
        self.has_output_norms = hasattr(self, "post_feedforward_layernorm")
        self.expert_coef, self.kl_coef = config.modality_expert_coef, config.modality_kl_coef
        self.modality_experts = config.modality_experts
        self.modality_gate = ModalityGate(text.hidden_size) if config.modality_gate else None
        # Beyond that of the other router losses: these are sums over samples, those are means.
        self.modality_loss_scale = 1.0
        self.mlp = MoE(
            text.hidden_size,
            text.intermediate_size,
            config.num_experts,
            config.num_experts_per_tok,
            load_balancing_coef=config.load_balancing_coef,
            router_z_coef=config.router_z_coef,
            aux_loss="inject",
            **({"activation": expert_activation(text)} | (config.moe_options or {})),
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        token_mask: torch.Tensor | None = None,
        modality_ids: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """Maps `[B, S, D]` to `[B, S, D]`.

        Args:
            hidden_states: `[B, S, D]`.
            token_mask: `[B, S]` bool, False on padding.
            modality_ids: `[B, S]` int64 from `modality_ids_of`; None for text only.
            **kwargs: passed to the attention.
        """
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        if self.has_output_norms:
            hidden_states = hidden_states + self.post_attention_layernorm(attended)
            normed = self.pre_feedforward_layernorm(hidden_states)
        else:
            hidden_states = hidden_states + attended
            normed = self.post_attention_layernorm(hidden_states)
        if self.modality_gate is None:
            output, router_input = self.mlp(normed, token_mask=token_mask), normed
        else:
            router_input = self.modality_gate(normed, modality_ids)
            output = self.mlp(normed, token_mask=token_mask, router_input=router_input)
        if modality_ids is not None and torch.is_grad_enabled():
            output = self._inject_modality_losses(output, router_input, modality_ids)
        if self.has_output_norms:
            output = self.post_feedforward_layernorm(output)
        return hidden_states + output

    def _inject_modality_losses(
        self, output: torch.Tensor, router_input: torch.Tensor, modality_ids: torch.Tensor
    ) -> torch.Tensor:
        if not self.expert_coef and not self.kl_coef:
            return output
        router = self.mlp.router
        logits = nn.functional.linear(router_input, router.weight)[..., : router.num_experts]
        loss = self.kl_coef * modality_kl_loss(logits, modality_ids) if self.kl_coef else 0
        if self.expert_coef:
            distance = modality_expert_loss(logits, modality_ids, self.modality_experts)
            loss = loss + self.expert_coef * distance
        scale = self.mlp.aux_loss_scale * self.modality_loss_scale
        return inject_aux_loss(output, loss * scale)


@functools.cache
def _with_experts(family: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A subclass of a family's decoder with MoE layers."""
    layers = family._no_split_modules or ()
    names = [*layers, *(f"UniMoE{name}" for name in layers)]
    return type(
        f"UniMoE{family.__name__}", (_ExpertsInLayers, family), {"_no_split_modules": names}
    )


@functools.cache
def _with_moe(layer: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a family's decoder layer whose FFN is an MoE layer."""
    return type(f"UniMoE{layer.__name__}", (_MoELayer, layer), {})
