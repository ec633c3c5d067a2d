"""The LLM of Uni-MoE: a LLaMA whose FFNs are MoE layers where the configuration says so."""

import torch
from torch import nn
from transformers import LlamaModel
from transformers import initialization as init
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from unimoe_kernels import GroupedExperts, MoE, TopKRouter, inject_aux_loss
from unimoe_model.configuration import UniMoEConfig
from unimoe_model.modality import ModalityGate, modality_expert_loss, modality_kl_loss


class UniMoEDecoderLayer(LlamaDecoderLayer):
    """LLaMA decoder layer whose FFN is an MoE layer; padding tokens count in no router loss.

    Losses of the router are injected: they change gradients and not the loss that is reported.
    """

    def __init__(self, config: UniMoEConfig, layer_idx: int):
        super().__init__(config.text_config, layer_idx)
        text = config.text_config
        self.expert_coef, self.kl_coef = config.modality_expert_coef, config.modality_kl_coef
        self.modality_experts = config.modality_experts
        self.modality_gate = ModalityGate(text.hidden_size) if config.modality_gate else None
        self.mlp = MoE(
            text.hidden_size,
            text.intermediate_size,
            config.num_experts,
            config.num_experts_per_tok,
            load_balancing_coef=config.load_balancing_coef,
            router_z_coef=config.router_z_coef,
            aux_loss="inject",
            **(config.moe_options or {}),
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        token_mask: torch.Tensor | None = None,
        modality_ids: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """Maps `[B, S, D]` to `[B, S, D]`.

        Args:
            hidden_states: `[B, S, D]`.
            token_mask: `[B, S]` bool, False on padding.
            modality_ids: `[B, S]` of `modality_ids_of`; None is all text.
            position_embeddings: of the rotary embedding.
            **kwargs: passed on to the attention.
        """
        attended, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states),
            position_embeddings=position_embeddings,
            **kwargs,
        )
        hidden_states = hidden_states + attended
        normed = self.post_attention_layernorm(hidden_states)
        if self.modality_gate is None:
            output, router_input = self.mlp(normed, token_mask=token_mask), normed
        else:
            router_input = self.modality_gate(normed, modality_ids)
            output = self.mlp(normed, token_mask=token_mask, router_input=router_input)
        if modality_ids is not None and torch.is_grad_enabled():
            output = self._inject_modality_losses(output, router_input, modality_ids)
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
        return inject_aux_loss(output, loss * self.mlp.aux_loss_scale)


class UniMoELanguageModel(LlamaModel):
    """LLaMA with experts in the layers that the configuration says.

    transformers lets each `PreTrainedModel` initialise its own modules, so the experts' weights
    are initialised here and not by the model around it.
    """

    def __init__(self, config: UniMoEConfig):
        super().__init__(config.text_config)
        for layer in range(config.text_config.num_hidden_layers):
            if config.is_moe_layer(layer):
                self.layers[layer] = UniMoEDecoderLayer(config, layer)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal(0, initializer_range) for linear maps, experts, router and embeddings."""
        super()._init_weights(module)
        # Of models outside its own package, transformers asks only for modules that hold
        # parameters themselves, which an MoE does not.
        if isinstance(module, TopKRouter | GroupedExperts):
            for parameter in module.parameters(recurse=False):
                init.normal_(parameter, std=self.config.initializer_range)
