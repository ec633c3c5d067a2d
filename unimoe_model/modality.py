"""Modality-aware routing: a linear map per modality before the router, and two losses."""

from collections.abc import Mapping
from itertools import combinations

import torch
from torch import Tensor, nn

from unimoe_model.configuration import MEDIA_KINDS

MODALITIES = ("text", *MEDIA_KINDS)
PADDING = -1
_RELEASED_PAIRS = (
    ("image", "audio"),
    ("image", "text"),
    ("audio", "text"),
    ("audio", "video"),
    ("video", "text"),
)


def modality_ids_of(
    input_ids: Tensor, media_token_ids: Mapping[str, int], token_mask: Tensor | None = None
) -> Tensor:
    """The modality of every position.

    Args:
        input_ids: `[B, S]` int64, with placeholders expanded.
        media_token_ids: token id of each media kind's placeholder.
        token_mask: `[B, S]` bool, False on padding; None is True everywhere.

    Returns:
        `[B, S]` int64: index into `MODALITIES`, or `PADDING`.
    """
    ids_BS = torch.zeros_like(input_ids)
    for kind, token in media_token_ids.items():
        ids_BS.masked_fill_(input_ids == token, MODALITIES.index(kind))
    return ids_BS if token_mask is None else ids_BS.masked_fill(~token_mask, PADDING)


class ModalityGate(nn.Module):
    """One linear map per modality, applied to the router's input only.

    Args:
        hidden_size: D.

    Reference:
        `use_fm_block` of the eight-expert release, a 1x1 convolution per modality, where speech
        and audio are one modality.
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.maps = nn.ModuleDict(
            {name: nn.Linear(hidden_size, hidden_size) for name in MODALITIES}
        )

    def forward(self, x: Tensor, modality_ids: Tensor | None) -> Tensor:
        """Maps `[B, S, D]` to `[B, S, D]` by `modality_ids` `[B, S]`; None and padding are text."""
        if modality_ids is None:
            return self.maps["text"](x)
        ids_BS1 = modality_ids.clamp(min=0).unsqueeze(-1)
        mapped = self.maps["text"](x)
        for index, name in enumerate(MODALITIES[1:], start=1):
            mapped = torch.where(ids_BS1 == index, self.maps[name](x), mapped)
        return mapped


def modality_expert_loss(
    router_logits: Tensor, modality_ids: Tensor, experts: Mapping[str, list[int]]
) -> Tensor:
    """Distance between the routing of media tokens and the experts assigned to their kind.

    For each sample, the mean over its tokens of `mean_e |p_e - t_e|`, where p is the softmax of the
    router logits, and t is one for the experts of the token's kind and zero for others. The term is
    zero for text tokens and for kinds without experts. Samples are summed.

    Args:
        router_logits: `[B, S, E]`.
        modality_ids: `[B, S]` int64 from `modality_ids_of`.
        experts: expert indices by media kind.

    Returns:
        Scalar in float32, or float64 for float64 logits.

    Reference:
        `aux_multimodal_loss` of the eight-expert release, which counts padding as tokens.
    """
    gates_BSE = _gates(router_logits)
    distance_BS = gates_BSE.new_zeros(modality_ids.shape)
    for kind, chosen in experts.items():
        target_E = gates_BSE.new_zeros(gates_BSE.shape[-1])
        target_E[chosen] = 1
        of_kind_BS = modality_ids == MODALITIES.index(kind)
        distance_BS = torch.where(of_kind_BS, (gates_BSE - target_E).abs().mean(-1), distance_BS)
    tokens_B = (modality_ids != PADDING).sum(1).clamp(min=1)
    return (distance_BS.sum(1) / tokens_B).sum()


def modality_kl_loss(
    router_logits: Tensor, modality_ids: Tensor, as_released: bool = False
) -> Tensor:
    """One minus the divergence between the routing of two modalities.

    For each pair (a, b) of modalities in a sample, `1 - KL(p_b || p_a)` of their mean router
    probabilities, averaged over pairs. Samples are summed; a sample of one modality contributes
    zero.

    Args:
        router_logits: `[B, S, E]`.
        modality_ids: `[B, S]` int64 from `modality_ids_of`.
        as_released: whether to reproduce the release, which applies a second softmax to the mean
            probabilities, divides the divergence by E, and omits the pair of image and video.

    Returns:
        Scalar in float32, or float64 for float64 logits.

    Reference:
        `aux_kl_loss` of the eight-expert release.
    """
    gates_BSE = _gates(router_logits)
    means, present = {}, {}
    for index, name in enumerate(MODALITIES):
        of_name_BS1 = (modality_ids == index).unsqueeze(-1)
        count_B1 = of_name_BS1.sum(1)
        means[name] = (gates_BSE * of_name_BS1).sum(1) / count_B1.clamp(min=1)
        present[name] = count_B1[:, 0] > 0
    pairs = _RELEASED_PAIRS if as_released else tuple(combinations(MODALITIES, 2))
    total_B = gates_BSE.new_zeros(gates_BSE.shape[0])
    pairs_B = torch.zeros_like(total_B)
    for first, second in pairs:
        both_B = present[first] & present[second]
        closeness_B = 1 - _divergence(means[second], means[first], as_released)
        total_B = total_B + closeness_B.where(both_B, 0)
        pairs_B = pairs_B + both_B
    return (total_B / pairs_B.clamp(min=1)).sum()


def _divergence(p_BE: Tensor, q_BE: Tensor, as_released: bool) -> Tensor:
    if as_released:
        p_BE, q_BE = p_BE.softmax(-1), q_BE.softmax(-1)
    # Absent modalities are all zeros here; the caller masks them.
    tiny = torch.finfo(p_BE.dtype).tiny
    p_BE, q_BE = p_BE.clamp(min=tiny), q_BE.clamp(min=tiny)
    summed_B = (p_BE * (p_BE.log() - q_BE.log())).sum(-1)
    return summed_B / p_BE.shape[-1] if as_released else summed_B


def _gates(router_logits: Tensor) -> Tensor:
    wide = torch.promote_types(router_logits.dtype, torch.float32)
    return router_logits.softmax(-1, dtype=wide)
