"""What the cases of the eight-expert code need: its names, spans, gradients and padding."""

import torch

from unimoe_model.checkpoints import to_published
from unimoe_model.modality import MODALITIES, PADDING

NAMED = {kind: kind for kind in ("text", "image", "video", "audio")}


def eight_expert_names(moe):
    """Where the eight-expert code's tensors lie in ours: a parameter and an index into it."""
    names = {"deepspeed_moe.gate.wg.weight": (moe.router.weight, slice(None))}
    width = moe.experts.intermediate_size
    rows = {"gate_proj": slice(None, width), "up_proj": slice(width, None)}
    for number in range(moe.experts.num_experts):
        expert = f"deepspeed_moe.experts.deepspeed_experts.{number}."
        for name, half in rows.items():
            names[f"{expert}{name}.weight"] = (moe.experts.gate_up_proj, (number, half))
        names[f"{expert}down_proj.weight"] = (moe.experts.down_proj, number)
        for name, lora in moe.experts.expert_lora.items():
            names[f"{expert}{name}_lora_A.weight"] = (lora.lora_A, number)
            names[f"{expert}{name}_lora_B.weight"] = (lora.lora_B, number)
    return names


def modality_ids_of_spans(spans, shape, named):
    """Ids of positions out of the published spans; text spans may run one past the end."""
    ids = torch.full(shape, PADDING)
    for kind, rows in spans.items():
        for row, pieces in enumerate(rows):
            for start, end in pieces:
                ids[row, start:end] = MODALITIES.index(named[kind])
    assert (ids != PADDING).all()
    return ids


def published_experts(config):
    kinds = ("image", "video", "audio")
    return {kind: config[f"{kind}_expert_indices"] for kind in kinds}


def gradients_with_lora(model, weights, scale):
    """Gradients by published names; those of LoRA follow from the matrix it was merged into."""
    own = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    found = to_published(own, "speech", eight=True)
    for name in [k for k in weights if k.endswith("_lora_A.weight")]:
        other = name.replace("_lora_A.", "_lora_B.")
        gradient = found[name.replace("_lora_A.", ".")]
        found[name] = scale * weights[other].T @ gradient
        found[other] = scale * gradient @ weights[name].T
    return found


def as_published_padding(model, io, batch, features):
    """Embeddings of a batch whose padding is the published one: token 0, then zeros."""
    kinds = {k.removesuffix("_features"): v for k, v in features.items()}
    media = {kind: model.model.connector(kind)(value) for kind, value in kinds.items()}
    embeddings = model.model.splice(batch["input_ids"], media)
    padded = (~io["in.attention_mask"].bool()).sum(1)
    positions = torch.arange(embeddings.shape[1])
    ends = batch["attention_mask"].sum(1) + padded
    return embeddings * (positions < ends[:, None]).unsqueeze(-1)
