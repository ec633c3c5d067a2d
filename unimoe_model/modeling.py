"""Uni-MoE: a LLaMA with MoE layers that reads text and the soft tokens of four media kinds."""

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import torch
from einops import rearrange
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from unimoe_kernels import MoE
from unimoe_model.configuration import MEDIA_KINDS, UniMoEConfig
from unimoe_model.connectors import AudioConnector, ImageConnector, SpeechConnector
from unimoe_model.language_model import UniMoELanguageModel
from unimoe_model.modality import modality_ids_of
from unimoe_model.tensor_files import permit_as_usual


class UniMoEPreTrainedModel(PreTrainedModel):
    """What the Uni-MoE classes tell transformers about loading them."""

    config: UniMoEConfig
    config_class = UniMoEConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["LlamaDecoderLayer", "UniMoEDecoderLayer"]
    _keep_in_fp32_modules_strict: ClassVar = ["correction_bias"]
    _skip_keys_device_placement: ClassVar = ["past_key_values"]
    _supports_sdpa = True

    def save_pretrained(self, save_directory, is_main_process: bool = True, **options):
        """As transformers' own, and leaves the permissions of the weights to the umask."""
        super().save_pretrained(save_directory, is_main_process=is_main_process, **options)
        if is_main_process:
            for path in Path(save_directory).glob("*.safetensors"):
                permit_as_usual(path)


class UniMoEModel(UniMoEPreTrainedModel):
    """Connectors and LLaMA; the output is the last hidden state."""

    def __init__(self, config: UniMoEConfig):
        super().__init__(config)
        text = config.text_config
        self.image_connector = ImageConnector(config.vision_feature_size, text.hidden_size)
        self.speech_connector = SpeechConnector(
            config.speech_feature_size,
            text.hidden_size,
            config.speech_num_queries,
            config.speech_connector,
        )
        self.audio_connector = AudioConnector(
            config.audio_feature_size,
            text.hidden_size,
            config.audio_num_queries,
            config.audio_connector,
        )
        self.language_model = UniMoELanguageModel(config)
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
        self, input_ids: torch.Tensor, media: dict[str, torch.Tensor | None]
    ) -> torch.Tensor:
        """Embeds the text and puts each kind's soft tokens at its placeholders.

        Args:
            input_ids: `[B, S]` int64; each item of a kind holds as many consecutive placeholders as
                the item has soft tokens.
            media: soft tokens `[items, n, D]` of each kind, in the order of the placeholders, row
                by row; None for a kind without items.

        Returns:
            Embeddings `[B, S, D]`.

        Raises:
            ValueError: if a kind's placeholders and soft tokens differ in number, or an item would
                be split between two rows.
        """
        placeholders = {
            kind: input_ids == self.config.media_token_ids[kind] for kind in MEDIA_KINDS
        }
        # Placeholders may lie outside the table, and what they would look up is replaced anyway.
        is_media = torch.stack(list(placeholders.values())).any(0)
        embeddings = self.get_input_embeddings()(input_ids.masked_fill(is_media, 0))
        for kind, is_placeholder in placeholders.items():
            tokens = media.get(kind)
            held_B = is_placeholder.sum(1).tolist()
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
        **kwargs,
    ):
        """Runs the LLM over spliced embeddings; see `UniMoEForConditionalGeneration.forward`."""
        if inputs_embeds is None:
            inputs_embeds = self.splice(input_ids, media or {})
        elif media:
            raise ValueError("media needs input_ids, whose placeholders say where it goes")
        if attention_mask is not None and attention_mask.dim() == 2:
            kwargs["token_mask"] = attention_mask[:, -inputs_embeds.shape[1] :].bool()
        if input_ids is not None and self._reads_modalities:
            kwargs["modality_ids"] = modality_ids_of(
                input_ids, self.config.media_token_ids, kwargs.get("token_mask")
            )
        return self.language_model(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs
        )


class UniMoEForConditionalGeneration(UniMoEPreTrainedModel, GenerationMixin):
    """Uni-MoE with its language-model head: training loss and `generate()`.

    The frozen encoders are not part of this module: their features come in (see
    `unimoe_model.encoders` and `UniMoEProcessor`), so that they are computed once and cached.
    """

    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: UniMoEConfig):
        super().__init__(config)
        self.model = UniMoEModel(config)
        text = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()
        # A placeholder stands for an input; one that was generated would find none to stand for.
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
        """The MoE layers, each with the number of its decoder layer."""
        for index, layer in enumerate(self.model.language_model.layers):
            if isinstance(layer.mlp, MoE):
                yield index, layer.mlp

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
        logits_to_keep: int = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Predicts the next token after each position.

        Args:
            input_ids: `[B, S]` int64, with placeholders expanded (`UniMoEProcessor` does it).
            attention_mask: `[B, S]`, 0 on padding.
            inputs_embeds: `[B, S, D]` instead of `input_ids`; then no media may be given.
            labels: `[B, S]` int64, -100 where no loss is wanted; shifted inside.
            image_features: `[images, n, C]` of the vision encoder.
            video_features: `[videos, frames, n, C]` of the vision encoder.
            speech_features: `[pieces, frames, C]` of the speech encoder.
            audio_features: `[pieces, frames, C]` of the audio encoder.
            audio_features_mask: `[pieces, frames]` bool, False on frames that only fill up.
            speech_query_states: `[pieces, queries, d_model]` instead of `speech_features`: what the
                speech connector has before its projector (to run a frozen connector body once).
            audio_query_states: likewise for audio.
            logits_to_keep: compute only the last n positions' logits; 0 for all.
            **kwargs: passed on to transformers' `LlamaModel` (cache, positions).

        Returns:
            `loss` (mean over labelled tokens, in the logits' dtype), `logits` `[B, S, V]`, cache.

        Raises:
            ValueError: if placeholders and media do not match in number, or a feature's shape is
                not the connector's.
        """
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
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        logits = self.lm_head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
            )
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values
        )

    def hidden_states(self, **inputs: torch.Tensor) -> torch.Tensor:
        """Last hidden states `[B, S, D]`, without the head; takes the inputs of `forward`."""
        media = {
            kind: (inputs.pop(f"{kind}_features", None), inputs.pop(f"{kind}_query_states", None))
            for kind in MEDIA_KINDS
        }
        mask = inputs.pop("audio_features_mask", None)
        return self._decode(media, mask, use_cache=False, **inputs).last_hidden_state

    def _decode(self, media: dict[str, tuple], audio_features_mask=None, **inputs):
        return self.model(media=self._soft_tokens(media, audio_features_mask), **inputs)

    def _soft_tokens(
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

    def _expand_inputs_for_generation(self, expand_size=1, input_ids=None, **kwargs):
        """Repeats each row for its beams, and its media with it: a row may hold several items."""
        media = {k: kwargs.pop(k) for k in list(kwargs) if k.endswith(MEDIA_SUFFIXES)}
        expanded, kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, input_ids=input_ids, **kwargs
        )
        for name, items in media.items():
            if items is not None and expand_size > 1:
                kind = name.split("_")[0]
                held_B = (input_ids == self.config.media_token_ids[kind]).sum(1)
                items_B = (held_B // self.config.num_soft_tokens(kind)).tolist()
                if sum(items_B) != len(items):
                    raise ValueError(
                        f"input_ids hold placeholders of {sum(items_B)} {kind} items, but {name}"
                        f" holds {len(items)}"
                    )
                rows = [
                    row.repeat(expand_size, *[1] * (items.dim() - 1))
                    for row in items.split(items_B)
                ]
                items = torch.cat(rows)
            kwargs[name] = items
        return expanded, kwargs

    def prepare_inputs_for_generation(self, input_ids, is_first_iteration=False, **kwargs):
        """Gives the media to the first step alone: later ones find it in the cache."""
        inputs = super().prepare_inputs_for_generation(
            input_ids, is_first_iteration=is_first_iteration, **kwargs
        )
        if not is_first_iteration and kwargs.get("use_cache", True):
            inputs = {k: v for k, v in inputs.items() if not k.endswith(MEDIA_SUFFIXES)}
        return inputs


MEDIA_SUFFIXES = ("_features", "_features_mask", "_query_states")
