"""Configuration of Uni-MoE: one LLaMA, one MoE layout, three connectors, three encoders by name."""

from typing import ClassVar

from transformers import LlamaConfig, PreTrainedConfig

MEDIA_KINDS = ("image", "video", "speech", "audio")
"""Kinds of media, each with a placeholder token `<kind>`, in the order prompts show them."""


class UniMoEConfig(PreTrainedConfig):
    """Describes a Uni-MoE model; the defaults are those of the published 7B x 4 release.

    Args:
        text_config: LLaMA configuration, or its fields as a dict.
        num_experts: experts in an MoE layer; 0 gives the dense model of stages 1 and 2.
        num_experts_per_tok: experts a token is routed to, K.
        moe_layer_interval: every n-th layer, counted from layer 0, is an MoE layer. 1: all.
        load_balancing_coef: weight of the load-balancing loss. The 4-expert release trains without.
        router_z_coef: weight of the router z-loss.
        vision_encoder: name of the frozen encoder of images and frames.
        vision_feature_size: width of its features.
        vision_num_tokens: soft tokens an image becomes; a video becomes as many, the mean over its
            frames.
        video_num_frames: frames taken of a video.
        speech_encoder: name of the frozen speech encoder.
        speech_feature_size: width of its features.
        speech_max_frames: most feature frames the connector is given at once.
        speech_connector: fields of the `WhisperConfig` of the speech connector's decoder.
        speech_num_queries: soft tokens a speech clip becomes.
        audio_encoder: name of the frozen audio encoder.
        audio_feature_size: width of its features.
        audio_connector: fields of the `Blip2QFormerConfig` of the audio connector.
        audio_num_queries: soft tokens an audio clip becomes.
        media_token_ids: token id of the placeholder of each media kind.

    Raises:
        ValueError: if an MoE field is out of range or a media kind has no token.

    Reference: arXiv:2405.11273, section 3, and the released `config.json`.
    """

    model_type = "unimoe"
    sub_configs: ClassVar = {"text_config": LlamaConfig}

    text_config: dict | LlamaConfig | None = None
    num_experts: int = 4
    num_experts_per_tok: int = 2
    moe_layer_interval: int = 1
    load_balancing_coef: float = 0.0
    router_z_coef: float = 0.0
    vision_encoder: str = "clip-vit-large-patch14-336"
    vision_feature_size: int = 1024
    vision_num_tokens: int = 576
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
    media_token_ids: dict | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        if not isinstance(self.text_config, LlamaConfig):
            self.text_config = LlamaConfig(**(self.text_config or {}))
        self.speech_connector = {**WHISPER_SMALL_DECODER, **(self.speech_connector or {})}
        self.audio_connector = {**BLIP2_QFORMER, **(self.audio_connector or {})}
        if self.media_token_ids is None:
            self.media_token_ids = {
                kind: self.text_config.vocab_size - len(MEDIA_KINDS) + i
                for i, kind in enumerate(MEDIA_KINDS)
            }
        self._check()
        super().__post_init__(**kwargs)

    def _check(self) -> None:
        if self.num_experts < 0:
            raise ValueError(f"num_experts ({self.num_experts}) must be 0 (dense) or positive")
        if self.num_experts and not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) must be at least 1 and at most"
                f" num_experts ({self.num_experts})"
            )
        if self.moe_layer_interval < 1:
            raise ValueError(f"moe_layer_interval ({self.moe_layer_interval}) must be at least 1")
        missing = [kind for kind in MEDIA_KINDS if kind not in self.media_token_ids]
        if missing:
            raise ValueError(f"media_token_ids must have all of {MEDIA_KINDS}, missing {missing}")

    def is_moe_layer(self, layer: int) -> bool:
        """Whether decoder layer `layer` holds experts."""
        return self.num_experts > 0 and layer % self.moe_layer_interval == 0

    def num_soft_tokens(self, kind: str) -> int:
        """Soft tokens that one item of media kind `kind` becomes."""
        if kind in ("image", "video"):
            return self.vision_num_tokens
        return {"speech": self.speech_num_queries, "audio": self.audio_num_queries}[kind]


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
