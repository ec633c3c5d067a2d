"""A whole Uni-MoE: a training step, the time to the first token, and generation."""

import copy
from collections.abc import Callable

import torch
from torch import nn

from unimoe_model.configuration import UniMoEConfig
from unimoe_model.modeling import UniMoEForConditionalGeneration

from .candidates import Candidate, Work
from .shapes import MODELS, NEW_TOKENS, Case, Model

EXPERTS, TOP_K, PICTURE_TOKENS = 4, 2, 9
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-1}


def bench_model(record, model_case, device, dtype):
    sizes = MODELS[model_case.layer]
    ours = _build(sizes, sizes.F, EXPERTS).to(device, dtype)
    dense = _build(sizes, TOP_K * sizes.F, 0).to(device, dtype)
    inputs = _inputs(sizes, ours.config, device, dtype)
    with torch.no_grad():
        expected = _looped(ours)(**inputs).logits

    def provider(model: UniMoEForConditionalGeneration, comparable: bool = True):
        def check() -> None:
            with torch.no_grad():
                difference = model(**inputs).logits.float() - expected.float()
            # By norm: if two choices of a token are equally good, correct models may differ.
            error = (difference.norm() / expected.float().norm()).item()
            assert error < TOLERANCE[dtype], f"logits have relative error {error:.2g}"

        def forward():
            return model(**inputs, labels=inputs["input_ids"]).loss

        training = model_case.mode == "training"
        return lambda: Candidate(
            run=_run(model, model_case, inputs),
            check=check if comparable else None,
            forward=forward if training else None,
            weights=tuple(model.parameters()),
        )

    record(
        model_case,
        {
            "dense": provider(dense, comparable=False),
            "looped": provider(_looped(ours)),
            "ours": provider(ours),
        },
        _work(model_case, dense, ours),
    )


def _run(
    model: UniMoEForConditionalGeneration, case: Case, inputs: dict[str, torch.Tensor]
) -> Callable[[], None]:
    if case.mode == "training":

        def step() -> None:
            model.zero_grad(set_to_none=True)
            model(**inputs, labels=inputs["input_ids"]).loss.backward()

        return step
    new = 1 if case.mode == "first-token" else NEW_TOKENS

    def generate() -> None:
        model.generate(**inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False)

    return generate


def _build(sizes: Model, width: int, experts: int) -> UniMoEForConditionalGeneration:
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    config = UniMoEConfig(
        text_config={
            "hidden_size": sizes.D,
            "intermediate_size": width,
            "num_hidden_layers": sizes.layers,
            "num_attention_heads": max(2, sizes.D // 64),
            "vocab_size": sizes.vocabulary,
            "max_position_embeddings": sizes.prompt + NEW_TOKENS,
            "initializer_range": sizes.D**-0.5,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        num_experts=experts,
        num_experts_per_tok=TOP_K,
        vision_feature_size=1280,
        vision_num_tokens=PICTURE_TOKENS,
        speech_feature_size=16,
        speech_max_frames=8,
        speech_num_queries=4,
        speech_connector={
            "d_model": 16,
            "decoder_layers": 1,
            "decoder_attention_heads": 2,
            "decoder_ffn_dim": 16,
            "max_target_positions": 8,
        },
        audio_feature_size=16,
        audio_num_queries=4,
        audio_connector={**small, "num_hidden_layers": 1, "cross_attention_frequency": 1},
        media_token_ids={"image": 3, "video": 4, "speech": 5, "audio": 6},
    )
    model = UniMoEForConditionalGeneration(config).eval()
    model.requires_grad_(False)
    model.model.language_model.requires_grad_(True)
    return model


def _looped(model: UniMoEForConditionalGeneration) -> UniMoEForConditionalGeneration:
    """The same model on the published layers."""
    looped = copy.deepcopy(model)
    for layer in looped.model.language_model.layers:
        layer.mlp = _IgnoresMask(layer.mlp.to_looped())
    return looped


class _IgnoresMask(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor, token_mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.layer(x)


def _inputs(
    sizes: Model, config: UniMoEConfig, device: torch.device, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(7, sizes.vocabulary, (sizes.batch, sizes.prompt), generator=generator)
    ids[:, 1 : 1 + PICTURE_TOKENS] = config.media_token_ids["image"]
    features = torch.randn(
        sizes.batch, PICTURE_TOKENS, config.vision_feature_size, generator=generator
    )
    return {
        "input_ids": ids.to(device),
        "attention_mask": torch.ones_like(ids).to(device),
        "image_features": features.to(device, dtype),
    }


def _work(
    case: Case, dense: UniMoEForConditionalGeneration, ours: UniMoEForConditionalGeneration
) -> Work:
    """Matmuls of decoder layers and head, without attention scores. Weights are read once per
    pass."""
    sizes = MODELS[case.layer]
    active = sum(p.numel() for p in dense.model.language_model.layers.parameters())
    held = sum(p.numel() for p in ours.model.language_model.layers.parameters())
    head = sizes.D * sizes.vocabulary
    size = next(dense.parameters()).element_size()
    if case.mode == "training":
        return Work(6 * case.tokens * (active + head), 3 * size * (held + head))
    new = 1 if case.mode == "first-token" else NEW_TOKENS
    flops = 2 * active * (case.tokens + sizes.batch * (new - 1)) + 2 * head * sizes.batch * new
    return Work(flops, size * (held + head) * new)
