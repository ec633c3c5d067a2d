"""Configuration of Uni-MoE: the LLM, its MoE layers, connectors, and encoders by name."""

from typing import ClassVar

from transformers import AutoConfig, Blip2QFormerConfig, PreTrainedConfig, WhisperConfig

from unimoe_model.config_fields import refuse_unknown_fields
from unimoe_model.llm_families import expert_activation, has_own_experts, llm_config
from unimoe_model.value_types import require_at_least, require_positive

MEDIA_KINDS = ("image", "video", "speech", "audio")
"""Media kinds, each with a placeholder token `<kind>`, in the order in which prompts have them."""


class UniMoEConfig(PreTrainedConfig):
    """Describes a Uni-MoE model; the defaults are those of the published 7B x 4 release.

    Args:
        text_config: configuration of the LLM, or its fields as a dict with a `model_type` listed in
            `llm_families` (default `"llama"`).
        num_experts: experts per MoE layer, E; 0 for the dense model of stages 1 and 2.
        num_experts_per_tok: experts per token, K.
        moe_layers: decoder layers with experts: `"all"`, `"even"` (0, 2, 4, ...; "interval" in the
            release), `"first_half"`, `"second_half"`, or a list of layer indices.
        moe_options: further options of `unimoe_kernels.MoE`, by name, such as `mode`, `top_p`,
            `num_null_experts` and `num_shared_experts`.
        modality_gate: whether the router's input passes through one linear map per modality.
        load_balancing_coef: weight of the load-balancing loss; 0 in the four-expert release.
        router_z_coef: weight of the router z-loss.
        modality_expert_coef: weight of `modality_expert_loss`.
        modality_experts: expert indices assigned to each media kind, for `modality_expert_loss`.
        modality_kl_coef: weight of `modality_kl_loss`.
        expert_origins: name of the task or file that each expert was trained on, in expert order.
        vision_encoder: name of the frozen encoder of images and video frames.
        vision_feature_size: width of the vision encoder's features.
        vision_num_tokens: patches per image or frame, each of which becomes a soft token; the soft
            tokens of a video are averaged over its frames.
        vision_intermediate_size: width of the hidden layer of the image connector; None for the
            width of the LLM, as released.
        vision_pooled_tokens: soft tokens per image or video, all from the mean of its patches, in
            the order of the words that they stand for; None for one for each patch, as released.
        video_num_frames: frames sampled from a video.
        speech_encoder: name of the frozen speech encoder.
        speech_feature_size: width of the speech encoder's features.
        speech_max_frames: maximum number of feature frames per piece of speech.
        speech_connector: fields of the `WhisperConfig` of the speech connector's decoder.
        speech_num_queries: soft tokens per piece of speech.
        audio_encoder: name of the frozen audio encoder.
        audio_feature_size: width of the audio encoder's features.
        audio_connector: fields of the `Blip2QFormerConfig` of the audio connector.
        audio_num_queries: soft tokens per piece of audio.
        vocabulary_sharpness: sharpness with which outputs of all connectors become weighted means
            of the LLM's embeddings (`vocabulary_mixture`); None to leave them as they are, as
            released.
        media_token_ids: token id of each media kind's placeholder; by default the first ids after
            the vocabulary, which need no row in the embedding table.

    Raises:
        ValueError: If an MoE field is out of range, a connector has an unknown field, a media kind
            has no token, or the LLM is not supported.

    Reference: arXiv:2405.11273, section 3, and the released `config.json`.
    """

    model_type = "unimoe"
    sub_configs: ClassVar = {"text_config": AutoConfig}

    text_config: dict | PreTrainedConfig | None = None
    num_experts: int = 4
    num_experts_per_tok: int = 2
    moe_layers: str | list[int] = "all"
    moe_options: dict | None = None
    modality_gate: bool = False
    load_balancing_coef: float = 0.0
    router_z_coef: float = 0.0
    modality_expert_coef: float = 0.0
    modality_experts: dict | None = None
    modality_kl_coef: float = 0.0
    expert_origins: list[str] | None = None
    vision_encoder: str = "clip-vit-large-patch14-336"
    vision_feature_size: int = 1024
    vision_num_tokens: int = 576
    vision_intermediate_size: int | None = None
    vision_pooled_tokens: int | None = None
    video_num_frames: int = 8
    speech_encoder: str = "whisper-small"
    speech_feature_size: int = 768
    speech_max_frames: int = 1500
    speech_connector: dict | None = None
    speech_num_queries: int = 50
    audio_encoder: str = "beats-iter3-plus-as2m"
    audio_feature_size: int = 768
    audio_connector: dict | None = None
    audio_num_queries: int = 50
    vocabulary_sharpness: float | None = None
    media_token_ids: dict | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        self.text_config = llm_config(self.text_config)
        self.speech_connector = {**WHISPER_SMALL_DECODER, **(self.speech_connector or {})}
        self.audio_connector = {**BLIP2_QFORMER, **(self.audio_connector or {})}
        if self.media_token_ids is None:
            self.media_token_ids = {
                kind: self.text_config.vocab_size + i for i, kind in enumerate(MEDIA_KINDS)
            }
        self._check()
        super().__post_init__(**kwargs)

    def _check(self) -> None:
        if self.num_experts < 0:
            raise ValueError(f"num_experts ({self.num_experts}) must be 0 (dense) or positive")
        if self.num_experts and has_own_experts(self.text_config):
            raise ValueError(
                f"num_experts ({self.num_experts}) must be 0: text_config"
                f" ({self.text_config.model_type}) has experts of its own"
            )
        if self.num_experts:
            expert_activation(self.text_config)
        choices = self.num_experts + (self.moe_options or {}).get("num_null_experts", 0)
        if self.num_experts and not 1 <= self.num_experts_per_tok <= choices:
            raise ValueError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) must be at least 1 and at most"
                f" num_experts ({self.num_experts}) with null ones ({choices})"
            )
        for name, kind in (("speech", WhisperConfig), ("audio", Blip2QFormerConfig)):
            own = f"{name}_connector"
            refuse_unknown_fields(getattr(self, own) or {}, kind, own)
        require_at_least(
            1,
            vision_intermediate_size=self.vision_intermediate_size,
            vision_pooled_tokens=self.vision_pooled_tokens,
        )
        require_positive(vocabulary_sharpness=self.vocabulary_sharpness)
        check_moe_layers(self.moe_layers, self.text_config.num_hidden_layers)
        self._check_modality_experts()
        if self.expert_origins is not None and len(self.expert_origins) != self.num_experts:
            raise ValueError(
                f"expert_origins ({self.expert_origins}) must name num_experts ({self.num_experts})"
            )
        missing = [kind for kind in MEDIA_KINDS if kind not in self.media_token_ids]
        if missing:
            raise ValueError(f"media_token_ids must have all of {MEDIA_KINDS}, missing {missing}")

    def _check_modality_experts(self) -> None:
        named = self.modality_experts or {}
        if self.modality_expert_coef and not named:
            raise ValueError(
                f"modality_expert_coef ({self.modality_expert_coef}) requires modality_experts"
            )
        for kind, experts in named.items():
            if kind not in MEDIA_KINDS or not all(0 <= i < self.num_experts for i in experts):
                raise ValueError(
                    f"modality_experts ({kind}: {experts}) must be experts below num_experts"
                    f" ({self.num_experts}) of a kind among {MEDIA_KINDS}"
                )

    def is_moe_layer(self, layer: int) -> bool:
        """Whether decoder layer `layer` holds experts."""
        if self.num_experts == 0:
            return False
        if isinstance(self.moe_layers, str):
            return PLACEMENTS[self.moe_layers](layer, self.text_config.num_hidden_layers)
        return layer in self.moe_layers

    def num_soft_tokens(self, kind: str) -> int:
        """Number of soft tokens per image, video or piece of a recording of media kind `kind`."""
        if kind in ("image", "video"):
            return self.vision_pooled_tokens or self.vision_num_tokens
        return {"speech": self.speech_num_queries, "audio": self.audio_num_queries}[kind]


def check_moe_layers(layers: str | list[int], depth: int) -> None:
    """Raises ValueError unless `layers` is a placement or lists some of `depth` decoder layers."""
    if isinstance(layers, str):
        known = layers in PLACEMENTS
    else:
        numbers = isinstance(layers, list | tuple) and all(isinstance(i, int) for i in layers)
        known = numbers and len(set(layers)) == len(layers) and all(0 <= i < depth for i in layers)
    if not known:
        raise ValueError(
            f"moe_layers ({layers!r}) must be one of {tuple(PLACEMENTS)} or a list of layers"
            f" below num_hidden_layers ({depth})"
        )


PLACEMENTS = {
    "all": lambda layer, depth: True,
    "even": lambda layer, depth: layer % 2 == 0,
    "first_half": lambda layer, depth: layer < depth // 2,
    "second_half": lambda layer, depth: layer >= depth // 2,
}
"""Which of `depth` layers hold experts, by the name of the placement (table 7d of the paper)."""
WHISPER_SMALL_DECODER = {
    "d_model": 768,
    "decoder_layers": 12,
    "decoder_attention_heads": 12,
    "decoder_ffn_dim": 3072,
    "max_target_positions": 448,
}
BLIP2_QFORMER = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "cross_attention_frequency": 2,
}
