"""`RouterConfig`: how a router selects and weights experts."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from typing import Any, TypedDict, TypeVar

import torch

from unimoe_kernels._renamed import warn_renamed
from unimoe_kernels.layers._inputs import check_at_least_zero

SPARSEMIXER = ("sparsemixer", "sparsemixer_renorm")
# Modes whose scores sum to `scale` for each token, also after choices are dropped.
RENORMALISED = ("topk_softmax", "softmax_topk_renorm", "sigmoid_renorm", "sparsemixer_renorm")

_Class = TypeVar("_Class", bound=type)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """Options of `TopKRouter`, and of `MoE` for its router.

    Attributes:
        mode: `"topk_softmax"` (Uni-MoE, Mixtral), `"softmax_topk"`, `"softmax_topk_renorm"`,
            `"sigmoid"` or `"sigmoid_renorm"` (DeepSeek-V3); see `topk_router`. Or `"sparsemixer"`
            (Phi-3.5-MoE; not the sampling of its training) and `"sparsemixer_renorm"` (DCMoE).
        correction_bias: whether the router has the buffer of that name. Not supported with
            `"topk_softmax"` and the SparseMixer modes.
        num_groups: number of groups of experts for group-limited routing.
        top_groups: number of groups from which a token's experts are selected.
        scale: factor applied to the scores.
        balance: `"all"` counts all K choices in the load-balancing loss, `"first"` only the first.
        num_null_experts: Z, number of experts without weights, whose output is zero. A token that
            selects one runs through fewer experts.
        top_p: drops the choices of a token beyond those that together reach this softmax
            probability, so that K is an upper limit. None keeps all. Not supported with the sigmoid
            modes.
        capacity_factor: limits an expert to `max(ceil(K * T / E * capacity_factor), min_capacity)`
            rows; first choices have priority over second ones. Tokens that token_mask excludes are
            dropped. None is dropless.
        min_capacity: minimum capacity in rows; see capacity_factor.
        capacity_renorm: whether the scores of choices within capacity are renormalised to include
            those of dropped ones.
        jitter: in training, the input of the router (not of the experts) is multiplied by uniform
            noise between `1 - jitter` and `1 + jitter`.
        sparsemixer_eps: threshold on the difference of logits in the SparseMixer modes; see
            `sparsemixer_scores`.
        router_dtype: dtype of the projection, such as torch.float32 or its name, regardless of x,
            the weight and torch.autocast. None is the dtype of the layer.

    Raises:
        ValueError: If an option is out of range, or two options are incompatible.

    Reference:
        Null experts and top_p: Uni-MoE-2.0, arXiv 2511.12609. Capacity: GShard, arXiv 2006.16668.
        Jitter: Switch Transformers, arXiv 2101.03961.
    """

    mode: str = "topk_softmax"
    correction_bias: bool = False
    num_groups: int = 1
    top_groups: int = 1
    scale: float = 1.0
    balance: str = "all"
    num_null_experts: int = 0
    top_p: float | None = None
    capacity_factor: float | None = None
    min_capacity: int = 4
    capacity_renorm: bool = False
    jitter: float = 0.0
    sparsemixer_eps: float = 0.01
    router_dtype: torch.dtype | str | None = None

    def __post_init__(self) -> None:
        check_at_least_zero(
            num_null_experts=self.num_null_experts,
            min_capacity=self.min_capacity,
            jitter=self.jitter,
            sparsemixer_eps=self.sparsemixer_eps,
        )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p ({self.top_p}) must be above 0 and at most 1")
        if self.top_p is not None and self.is_sigmoid:
            raise ValueError(
                f"mode ({self.mode!r}) must be one with a softmax for top_p ({self.top_p})"
            )
        if self.capacity_factor is not None and not self.capacity_factor > 0:
            raise ValueError(f"capacity_factor ({self.capacity_factor}) must be above 0")
        if self.is_sparsemixer and self.correction_bias:
            raise ValueError(f"correction_bias is not supported with mode={self.mode!r}")
        object.__setattr__(self, "router_dtype", _floating_dtype(self.router_dtype))

    @property
    def is_sigmoid(self) -> bool:
        """Whether the mode uses sigmoid probabilities."""
        return self.mode.startswith("sigmoid")

    @property
    def is_sparsemixer(self) -> bool:
        """Whether the mode uses `sparsemixer_scores`."""
        return self.mode in SPARSEMIXER

    @property
    def renormalises(self) -> bool:
        """Whether the scores of a token sum to `scale`."""
        return self.mode in RENORMALISED

    def unusual(self) -> dict[str, Any]:
        """Returns the options that differ from their defaults, by name."""
        options = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in options.items() if value != _USUAL[name]}


class RouterOptions(TypedDict, total=False):
    """The options of `RouterConfig` as keyword arguments, for type checkers."""

    mode: str
    correction_bias: bool
    num_groups: int
    top_groups: int
    scale: float
    balance: str
    num_null_experts: int
    top_p: float | None
    capacity_factor: float | None
    min_capacity: int
    capacity_renorm: bool
    jitter: float
    sparsemixer_eps: float
    router_dtype: torch.dtype | str | None


_FIELDS = dataclasses.fields(RouterConfig)
_USUAL = {field.name: field.default for field in _FIELDS}


def config_with(owner: str, config: RouterConfig | None, options: RouterOptions) -> RouterConfig:
    """Returns a config with some options replaced by keyword arguments of a layer.

    Args:
        owner: name of the layer, for errors.
        config: the config, or None for the defaults.
        options: replacements by name.

    Raises:
        TypeError: If an option does not exist, or config is not a `RouterConfig`.
    """
    for name in options:
        if name not in _USUAL:
            close = difflib.get_close_matches(name, _USUAL, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise TypeError(f"{owner} has no option {name!r}{hint}")
    if config is None:
        return RouterConfig(**options)
    if not isinstance(config, RouterConfig):
        raise TypeError(f"router_config ({type(config).__name__}) must be a RouterConfig")
    return dataclasses.replace(config, **options)


def shows_router_options(layer: _Class) -> _Class:
    """Decorates a layer to list `**router_options` in `help` and `inspect.signature`."""
    signature = inspect.signature(layer.__init__)  # type: ignore[misc]
    parameters = [p for p in signature.parameters.values() if p.kind != p.VAR_KEYWORD]
    parameters += [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type
        )
        for field in _FIELDS
    ]
    signature = signature.replace(parameters=parameters)
    layer.__init__.__signature__ = signature  # type: ignore[misc]
    return layer


def moved_to_config(name: str) -> property:
    """Returns a deprecated property that forwards to an option of `RouterConfig`."""

    def get(router: Any) -> Any:
        warn_renamed(f"TopKRouter.{name}", f"TopKRouter.config.{name}")
        return getattr(router.config, name)

    def set_(router: Any, value: Any) -> None:
        warn_renamed(f"TopKRouter.{name} = ...", "TopKRouter.config = dataclasses.replace(...)", 5)
        router.config = dataclasses.replace(router.config, **{name: value})

    return property(get, set_, doc=f"Deprecated name of `config.{name}`.")


def _floating_dtype(router_dtype: torch.dtype | str | None) -> torch.dtype | None:
    dtype = getattr(torch, router_dtype, None) if isinstance(router_dtype, str) else router_dtype
    if router_dtype is not None and not getattr(dtype, "is_floating_point", False):
        raise ValueError(f"router_dtype ({router_dtype}) must be a floating point dtype")
    return dtype
