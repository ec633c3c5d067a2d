"""Uni-MoE: an LLM with MoE layers whose inputs are text and soft tokens of four media kinds."""

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import torch
from einops import rearrange
from torch import nn
from transformers import Cache, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from unimoe_kernels import MoE
from unimoe_model.causal_lm_loss import causal_lm_loss
from unimoe_model.configuration import MEDIA_KINDS, UniMoEConfig
from unimoe_model.connectors import build_connector, vocabulary_mixture
from unimoe_model.language_model import build_language_model
from unimoe_model.media_generation import CACHE, MediaGenerationMixin
from unimoe_model.modality import modality_ids_of
from unimoe_model.permissions import permit_as_usual


class UniMoEPreTrainedModel(PreTrainedModel):
    """Base class of the Uni-MoE models, with the settings that transformers reads."""

    config: UniMoEConfig
    config_class = UniMoEConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _keep_in_fp32_modules_strict: ClassVar = ["correction_bias"]
    _skip_keys_device_placement: ClassVar = ["cache", "past_key_values"]
    _supports_sdpa = True
    _can_compile_fullgraph = True

    def save_pretrained(self, save_directory, is_main_process: bool = True, **options):
        """Saves like `PreTrainedModel.save_pretrained`, with file permissions set by the umask."""
        super().save_pretrained(save_directory, is_main_process=is_main_process, **options)
        if is_main_process:
            for path in Path(save_directory).glob("*.safetensors"):
                permit_as_usual(path)


class UniMoEModel(UniMoEPreTrainedModel):
    """The connectors and the LLM without its head.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: UniMoEConfig):
        super().__init__(config)
        self.image_connector = build_connector(config, "image")
        self.speech_connector = build_connector(config, "speech")
        self.audio_connector = build_connector(config, "audio")
        self.language_model = build_language_model(config)
        self.post_init()

    @property
    def _reads_modalities(self) -> bool:
        config = self.config
        return bool(config.modality_gate or config.modality_expert_coef or config.modality_kl_coef)

    def get_input_embeddings(self) -> nn.Module:
        """The LLM's token embedding."""
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the LLM's token embedding."""
        self.language_model.embed_tokens = value

    def connector(self, kind: str) -> nn.Module:
        """The connector of a media kind; images and videos share one."""
        return getattr(self, f"{'image' if kind == 'video' else kind}_connector")

    def splice(
        self,
        input_ids: torch.Tensor,
        media: dict[str, torch.Tensor | None],
        continues: bool = False,
    ) -> torch.Tensor:
        """Embeds token ids and replaces placeholders by soft tokens.

        Args:
            input_ids: `[B, S]` int64; each media item has as many consecutive placeholders as soft
                tokens.
            media: soft tokens `[items, n, D]` by kind, in the order of the placeholders, row by
                row; None for a kind without items.
            continues: whether a cache holds earlier tokens. Without media, placeholders then become
                NaN instead of raising an error, so that the device is not synchronised.

        Returns:
            Embeddings `[B, S, D]`.

        Raises:
            ValueError: If a kind's placeholders and soft tokens differ in number, or an item would
                be split between two rows.
        """
        placeholders = {
            kind: input_ids == self.config.media_token_ids[kind] for kind in MEDIA_KINDS
        }
        # Placeholder ids may lie outside of the table, and their embeddings are replaced anyway.
        is_media = torch.stack(list(placeholders.values())).any(0)
        embeddings = self.get_input_embeddings()(input_ids.masked_fill(is_media, 0))
        media = {kind: tokens for kind, tokens in media.items() if tokens is not None}
        if continues and not media:
            # Counting placeholders would synchronise the device in each decoding step.
            return embeddings.masked_fill(is_media.unsqueeze(-1), torch.nan)
        held_KB = torch.stack([mask.sum(1) for mask in placeholders.values()]).tolist()
        for (kind, is_placeholder), held_B in zip(placeholders.items(), held_KB, strict=True):
            tokens = media.get(kind)
            given = 0 if tokens is None else tokens.shape[0] * tokens.shape[1]
            if sum(held_B) != given:
                raise ValueError(
                    f"input_ids hold {sum(held_B)} <{kind}> placeholder tokens, but {given} soft"
                    f" tokens were given; one {kind} takes {self.config.num_soft_tokens(kind)}"
                )
            if any(held % self.config.num_soft_tokens(kind) for held in held_B):
                raise ValueError(
                    f"rows of input_ids hold {held_B} <{kind}> placeholder tokens, each must hold"
                    f" a multiple of {self.config.num_soft_tokens(kind)}: whole items"
                )
            if given:
                embeddings = embeddings.masked_scatter(
                    rearrange(is_placeholder, "b s -> b s 1"), tokens.to(embeddings.dtype)
                )
        return embeddings

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        media: dict[str, torch.Tensor | None] | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        **kwargs,
    ):
        """Runs the LLM over spliced embeddings; see `UniMoEForConditionalGeneration.forward`."""
        if cache is not None and past_key_values is not None:
            raise ValueError("give cache or past_key_values, not both")
        cache = past_key_values if cache is None else cache
        if inputs_embeds is None:
            inputs_embeds = self.splice(input_ids, media or {}, _continues(cache, input_ids))
        elif media:
            raise ValueError("media requires input_ids, whose placeholders mark where it belongs")
        if attention_mask is not None and attention_mask.dim() == 2:
            kwargs["token_mask"] = attention_mask[:, -inputs_embeds.shape[1] :].bool()
        if input_ids is not None and self._reads_modalities:
            kwargs["modality_ids"] = modality_ids_of(
                input_ids, self.config.media_token_ids, kwargs.get("token_mask")
            )
        return self.language_model(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, **{CACHE: cache}, **kwargs
        )


class UniMoEForConditionalGeneration(UniMoEPreTrainedModel, MediaGenerationMixin):
    """Uni-MoE with its language-model head, for training and `generate()`.

    The frozen encoders are not part of this module: it receives their features, which
    `UniMoEProcessor` computes, so that they can be cached.

    Args:
        config: the model's configuration.
    """

    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: UniMoEConfig):
        super().__init__(config)
        self.model = UniMoEModel(config)
        text = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()
        # A generated placeholder would have no media item.
        self.generation_config.suppress_tokens = sorted(config.media_token_ids.values())

    def get_input_embeddings(self) -> nn.Module:
        """The LLM's token embedding."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the LLM's token embedding."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The language-model head."""
        return self.lm_head

    def moe_layers(self) -> Iterator[tuple[int, MoE]]:
        """Yields the MoE layers, each with the index of its decoder layer."""
        for index, layer in enumerate(self.model.language_model.layers):
            if isinstance(layer.mlp, MoE):
                yield index, layer.mlp

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        video_features: torch.Tensor | None = None,
        speech_features: torch.Tensor | None = None,
        audio_features: torch.Tensor | None = None,
        audio_features_mask: torch.Tensor | None = None,
        speech_query_states: torch.Tensor | None = None,
        audio_query_states: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Computes logits of the next token at each position and, with labels, the loss.

        Args:
            input_ids: `[B, S]` int64, with placeholders expanded, as by `UniMoEProcessor`.
            attention_mask: `[B, S]`, 0 on padding.
            inputs_embeds: `[B, S, D]` instead of `input_ids`; not supported with media.
            labels: `[B, S]` int64, -100 at positions without loss; shifted internally. With
                `logits_to_keep`, labels of the kept positions.
            image_features: `[images, n, C]`, from the vision encoder.
            video_features: `[videos, frames, n, C]`, from the vision encoder.
            speech_features: `[pieces, frames, C]`, from the speech encoder.
            audio_features: `[pieces, frames, C]`, from the audio encoder.
            audio_features_mask: `[pieces, frames]` bool, False on padding.
            speech_query_states: `[pieces, queries, d_model]` instead of `speech_features`: outputs
                of the speech connector before its projector, which can be cached if its body is
                frozen.
            audio_query_states: `[pieces, queries, hidden]` instead of `audio_features`: outputs of
                the audio connector before its projector.
            logits_to_keep: number of last positions to compute logits for, 0 for all; or a tensor
                of positions, `[n]`.
            num_items_in_batch: number of labelled tokens over all accumulated batches, as passed by
                the `Trainer` of transformers; the loss is then the sum divided by it.
            past_key_values: cache of keys and values of earlier tokens.
            cache: synonym of `past_key_values`, the name in transformers 5.24 and later.
            **kwargs: passed to the LLM (`position_ids`, `use_cache`, `output_hidden_states`,
                `output_attentions`); with `return_dict=False` the output is a tuple.
                `shift_labels` `[B, S]` int64, labels that are already shifted, may replace
                `labels`.

        Returns:
            `loss` (mean over labelled tokens, at least float32), `logits` `[B, S, V]`, the cache,
            `hidden_states`, `attentions`.

        Raises:
            ValueError: If the numbers of placeholders and soft tokens differ, features have a wrong
                shape, or labels do not have the shape of the logits.
        """
        # As a named parameter, `Trainer` would require it in order to evaluate a loss.
        shift_labels = kwargs.pop("shift_labels", None)
        outputs = self._decode(
            {
                "image": (image_features, None),
                "video": (video_features, None),
                "speech": (speech_features, speech_query_states),
                "audio": (audio_features, audio_query_states),
            },
            audio_features_mask,
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            cache=cache,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        if isinstance(logits_to_keep, torch.Tensor):
            hidden = hidden[:, logits_to_keep]
        elif logits_to_keep:
            hidden = hidden[:, -logits_to_keep:]
        logits = self.lm_head(hidden)
        loss = None
        if labels is not None or shift_labels is not None:
            loss = causal_lm_loss(logits, labels, num_items_in_batch, shift_labels)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE: getattr(outputs, CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def hidden_states(self, **inputs: torch.Tensor) -> torch.Tensor:
        """Computes the last hidden states `[B, S, D]`, without the head.

        Args:
            **inputs: inputs of `forward`.
        """
        media, mask = _pop_media(inputs)
        return self._decode(media, mask, use_cache=False, **inputs).last_hidden_state

    def connector_outputs(self, input_ids: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        """Embeds token ids and replaces placeholders by outputs of the connectors.

        These are the inputs of the LLM, unless the configuration has a `vocabulary_sharpness`.

        Args:
            input_ids: `[B, S]` int64, with placeholders expanded.
            **inputs: features or query states of the media; see `forward`.

        Returns:
            `[B, S, D]`.
        """
        return self.model.splice(input_ids, self._connect(*_pop_media(inputs)))

    def _decode(self, media: dict[str, tuple], audio_features_mask=None, **inputs):
        return self.model(media=self._soft_tokens(media, audio_features_mask), **inputs)

    def _soft_tokens(
        self, inputs: dict[str, tuple], audio_features_mask: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        outputs = self._connect(inputs, audio_features_mask)
        sharpness = self.config.vocabulary_sharpness
        if sharpness is None or not outputs:
            return outputs
        # Together, because each call computes the directions of all embeddings.
        flat = [own.flatten(0, 1) for own in outputs.values()]
        table = self.get_input_embeddings().weight
        mixed = vocabulary_mixture(torch.cat(flat), table, sharpness).split([*map(len, flat)])
        pairs = zip(outputs.items(), mixed, strict=True)
        return {kind: soft.view(own.shape) for (kind, own), soft in pairs}

    def _connect(
        self, inputs: dict[str, tuple], audio_features_mask: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        media = {}
        for kind, (features, query_states) in inputs.items():
            if features is not None and query_states is not None:
                raise ValueError(f"give {kind}_features or {kind}_query_states, not both")
            connector = self.model.connector(kind)
            if features is not None:
                self._check_features(kind, features)
                masks = (audio_features_mask,) if kind == "audio" else ()
                media[kind] = connector(features.to(self.dtype), *masks)
            elif query_states is not None:
                self._check_query_states(kind, query_states, connector)
                media[kind] = connector.projector(query_states.to(self.dtype))
        return media

    def _check_features(self, kind: str, features: torch.Tensor) -> None:
        config = self.config
        size = {
            "speech": config.speech_feature_size,
            "audio": config.audio_feature_size,
        }.get(kind, config.vision_feature_size)
        rows = config.vision_num_tokens
        expected = {
            "image": (None, rows, size),
            "video": (None, config.video_num_frames, rows, size),
        }.get(kind, (None, None, size))
        shape = tuple(features.shape)
        if len(shape) != len(expected) or any(
            want not in (None, have) for want, have in zip(expected, shape, strict=True)
        ):
            wanted = ", ".join("*" if n is None else str(n) for n in expected)
            raise ValueError(f"{kind}_features (shape {list(shape)}) must have shape [{wanted}]")

    def _check_query_states(
        self, kind: str, query_states: torch.Tensor, connector: nn.Module
    ) -> None:
        expected = (self.config.num_soft_tokens(kind), connector.projector.in_features)
        shape = tuple(query_states.shape)
        if len(shape) != 3 or shape[1:] != expected:
            raise ValueError(
                f"{kind}_query_states (shape {list(shape)}) must have shape"
                f" [*, {expected[0]}, {expected[1]}]"
            )


def _pop_media(inputs: dict) -> tuple[dict[str, tuple], torch.Tensor | None]:
    """Removes the features and query states of each kind and the audio mask from a batch."""
    media = {
        kind: (inputs.pop(f"{kind}_features", None), inputs.pop(f"{kind}_query_states", None))
        for kind in MEDIA_KINDS
    }
    return media, inputs.pop("audio_features_mask", None)


def _continues(cache: Cache | None, input_ids: torch.Tensor) -> bool:
    """Whether a cache holds earlier tokens, determined without synchronising the device."""
    length = 0 if cache is None else cache.get_seq_length()
    # The length of a static cache is a tensor on its device.
    return input_ids.shape[1] == 1 if isinstance(length, torch.Tensor) else length > 0
