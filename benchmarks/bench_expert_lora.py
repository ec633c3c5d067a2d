"""A training step of LoRA on frozen experts, compared with peft and a dense FFN.

`ours-int4` trains LoRA on experts that were quantised to int4 in groups of 64, or of 32 where a
width is no multiple of 64.
"""

import copy
import functools
from collections.abc import Callable

import torch
from torch import nn

from unimoe_kernels import (
    MoE,
    SwiGLUFFN,
    add_expert_lora,
    dequantize_weight,
    quantize_experts,
    stack_experts,
)
from unimoe_kernels.testing import relative_error

from .candidates import Candidate, UnavailableError, Work
from .problem import Problem
from .providers import mixtral_block
from .shapes import Case

RANK = 16
TARGETS = ("gate_up_proj", "down_proj")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}

Gradients = Callable[[], dict[str, torch.Tensor]]


def bench_expert_lora(record, lora_case, device, dtype):
    problem = LoraProblem(lora_case, device, dtype)
    record(
        lora_case,
        {
            "dense": problem.dense,
            "peft-eager": lambda: problem.peft("eager"),
            "peft-grouped_mm": lambda: problem.peft("grouped_mm"),
            "ours-int4": problem.ours_int4,
            "ours": problem.ours,
        },
        problem.work,
    )


class LoraProblem:
    """A layer with LoRA of rank 16 on all experts, and its outputs in higher precision.

    Attributes:
        work: work of a step. Frozen weights take part in two matmuls rather than three.
    """

    def __init__(self, case: Case, device: torch.device, dtype: torch.dtype) -> None:
        self._base = Problem(case, device, dtype)
        D, F, E, K = self._base.layer
        self._layer = MoE(D, F, E, K, device=device, dtype=dtype)
        self._layer.load_state_dict(self._base.moe.state_dict())
        add_expert_lora(self._layer, RANK, alpha=RANK)
        generator = torch.Generator(device).manual_seed(1)
        with torch.no_grad():
            for lora in self._adapters().values():
                lora.lora_B.normal_(std=RANK**-0.5, generator=generator)
        rows, size = case.tokens * K, self._base.x.element_size()
        flops = 2 * (6 * rows * D * F + 2 * case.tokens * D * E)
        flops += 3 * 2 * rows * RANK * (2 * D + 3 * F)
        self.work = Work(flops, 2 * size * (3 * E * D * F + 2 * case.tokens * D))

    def ours(self) -> Candidate:
        """`add_expert_lora`."""
        gradients = functools.partial(_gradients, self._adapters())
        return self._candidate("ours", self._layer, gradients, lambda: self._expected)

    def ours_int4(self) -> Candidate:
        """`quantize_experts` before `add_lora`, checked with the numbers of the rounded weights."""
        layer = copy.deepcopy(self._base.moe).requires_grad_(False)
        quantize_experts(layer, "int4", self._base.layer.group_size)
        exact = copy.deepcopy(self._base.moe)
        with torch.no_grad():
            for target in TARGETS:
                weight = getattr(layer.experts, target).weight
                getattr(exact.experts, target).copy_(dequantize_weight(weight, weight.scales.dtype))
        add_expert_lora(layer, RANK, alpha=RANK)
        adapters = layer.experts.expert_lora
        adapters.load_state_dict(self._adapters().state_dict())
        gradients = functools.partial(_gradients, adapters)
        return self._candidate("ours-int4", layer, gradients, lambda: self._reference(exact))

    def peft(self, implementation: str) -> Candidate:
        """peft on Mixtral's block of transformers, with the same weights."""
        try:
            import peft
        except ImportError as error:
            raise UnavailableError(f"peft does not import: {error}") from error
        config = peft.LoraConfig(
            r=RANK,
            lora_alpha=RANK,
            target_modules=[],
            target_parameters=[f"experts.{target}" for target in TARGETS],
        )
        block = mixtral_block(self._base, implementation).requires_grad_(False)
        block = peft.inject_adapter_in_model(config, block)
        wrappers = {
            module.parameter_name: module
            for module in block.modules()
            if getattr(module, "parameter_name", None) in TARGETS
        }
        with torch.no_grad():
            for target, lora in self._adapters().items():
                # peft stores A of all experts in one matrix, and B with the expert index fastest.
                wrapper = wrappers[target]
                wrapper.lora_A["default"].weight.copy_(lora.lora_A.flatten(0, 1))
                wrapper.lora_B["default"].weight.copy_(lora.lora_B.permute(1, 2, 0).flatten(1))
        gradients = functools.partial(_gradients_of_peft, wrappers)
        return self._candidate(f"peft-{implementation}", block, gradients, lambda: self._expected)

    def dense(self) -> Candidate:
        """One frozen SwiGLU FFN as wide as K experts, its three projections with such LoRA."""
        D, F, _, K = self._base.layer
        like = {"device": self._base.x.device, "dtype": self._base.x.dtype}
        layer = SwiGLUFFN(D, K * F, **like).requires_grad_(False)
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(layer, name, _LoraLinear(getattr(layer, name)))
        return self._candidate("dense", layer)

    def _adapters(self) -> nn.ModuleDict:
        return self._layer.experts.expert_lora

    @functools.cached_property
    def _expected(self) -> dict[str, torch.Tensor]:
        return self._reference(self._base.moe)

    def _candidate(
        self,
        name: str,
        layer: nn.Module,
        gradients: Gradients | None = None,
        expected: Gradients | None = None,
    ) -> Candidate:
        base = self._base

        def step(x: torch.Tensor) -> torch.Tensor:
            layer.zero_grad(set_to_none=True)
            y = layer(x)
            y.backward(base.grad)
            return y.detach()

        def run() -> None:
            step(base.x.detach().requires_grad_())

        def check() -> None:
            x = base.x.detach().requires_grad_()
            y = step(x)
            answers = {"output": y[0, base.clear], "gradient of x": x.grad} | gradients()
            limit = TOLERANCE[x.dtype]
            for what, exact in expected().items():
                error = relative_error(answers[what], exact)
                assert error < limit, f"{name}: {what} has relative error {error:.2g}"

        return Candidate(
            run=run,
            check=check if gradients is not None else None,
            forward=lambda: layer(base.x.detach().requires_grad_()),
            weights=(*layer.parameters(), *layer.buffers()),
        )

    def _reference(self, moe: MoE) -> dict[str, torch.Tensor]:
        """Outputs of the published layer with expert weights `W + B @ A`, in float64."""
        base = self._base
        merged = MoE(*base.layer, device=base.x.device, dtype=torch.float64)
        merged.load_state_dict(moe.state_dict())
        pairs = {
            target: (lora.lora_A.detach().double(), lora.lora_B.detach().double())
            for target, lora in self._adapters().items()
        }
        with torch.no_grad():
            for target, (lora_A, lora_B) in pairs.items():
                getattr(merged.experts, target).add_(lora_B @ lora_A)
        looped = merged.to_looped()
        x = base.x.detach().double().requires_grad_()
        y = looped(x)
        y.backward(base.grad.double())
        grads = [{key: p.grad for key, p in e.named_parameters()} for e in looped.experts]
        grads = dict(zip(TARGETS, stack_experts(grads), strict=True))
        expected = {"output": y.detach()[0, base.clear], "gradient of x": x.grad}
        for target, (lora_A, lora_B) in pairs.items():
            expected[f"gradient of {target} A"] = lora_B.mT @ grads[target]
            expected[f"gradient of {target} B"] = grads[target] @ lora_A.mT
        return expected


def _gradients(adapters: nn.ModuleDict) -> dict[str, torch.Tensor]:
    grads = {}
    for target, lora in adapters.items():
        grads[f"gradient of {target} A"] = lora.lora_A.grad
        grads[f"gradient of {target} B"] = lora.lora_B.grad
    return grads


def _gradients_of_peft(wrappers: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    grads = {}
    for target, wrapper in wrappers.items():
        grad_A = wrapper.lora_A["default"].weight.grad
        grad_B = wrapper.lora_B["default"].weight.grad
        grads[f"gradient of {target} A"] = grad_A.unflatten(0, (-1, RANK))
        grads[f"gradient of {target} B"] = grad_B.unflatten(1, (RANK, -1)).permute(2, 0, 1)
    return grads


class _LoraLinear(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        like = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.base = base
        self.lora_A = nn.Linear(base.in_features, RANK, bias=False, **like)
        self.lora_B = nn.Linear(RANK, base.out_features, bias=False, **like)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.lora_B(self.lora_A(x))
