"""Helpers for cases of the eight-expert code: names, spans, gradients and padding."""

import torch
from in_memory import to_published

from unimoe_kernels import TopKRouter, topk_router
from unimoe_model.modality import MODALITIES, PADDING, modality_expert_loss, modality_kl_loss

NAMED = {kind: kind for kind in ("text", "image", "video", "audio")}


def gate_of_logits(num_experts, top_k, facts):
    """The gate as a router whose weight is the identity: it is given logits."""
    dropping = {
        "capacity_factor": facts.get("capacity_factor"),
        "min_capacity": facts.get("min_capacity"),
        "capacity_renorm": True,
    }
    router = TopKRouter(
        num_experts,
        num_experts,
        top_k,
        mode="softmax_topk_renorm" if top_k == 2 else "softmax_topk",
        balance="first",
        **(dropping if facts.get("drop_tokens") else {}),
    )
    with torch.no_grad():
        router.weight.copy_(torch.eye(num_experts))
    return router


def scores_by_expert(routed, num_experts):
    """Scores `[T, E]`, 0 where an expert was not chosen or gave the token up."""
    dropped = routed.ids >= num_experts
    ids = routed.ids.long().masked_fill(dropped, 0)
    scores = routed.scores.masked_fill(dropped, 0)
    return scores.new_zeros(len(ids), num_experts).scatter_add(1, ids, scores)


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


def record_routers(model):
    """A list that gets the logits and the choices of every router as it runs."""
    seen = []
    for _, moe in model.moe_layers():
        moe.router.register_forward_hook(
            lambda router, args, routed: seen.append((args[0] @ router.weight.T, routed))
        )
    return seen


def losses_of_layer(logits, ids, config):
    """The auxiliary losses of one router's logits, by the name of their coefficient."""
    routed = topk_router(
        logits.flatten(0, 1),
        config["num_experts_per_tok"],
        mode="softmax_topk_renorm",
        balance="first",
    )
    return {
        "aux_balance_loss": routed.load_balancing_loss,
        "aux_multimodal_loss": modality_expert_loss(logits, ids, published_experts(config)),
        "aux_kl_loss": modality_kl_loss(logits, ids, as_released=True),
    }


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
