"""One operator with inputs, and the output in higher precision that every provider must match."""

from collections.abc import Callable, Mapping

import torch

import unimoe_kernels
from unimoe_kernels import expert_sort
from unimoe_kernels.testing import relative_error

from .candidates import Candidate, Provider, Work
from .shapes import LAYERS, Case

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}

Operator = Callable[..., torch.Tensor]


class Routed:
    """Choices of a case and their `expert_sort`.

    Attributes:
        logits: `[T, E]`, float32.
        scores: `[T, K]`, float32.
        ids: `[T, K]`, int32.
        sort: result of `expert_sort`.
        groups: rows of each expert, as Python integers.
    """

    def __init__(self, case: Case, device: torch.device) -> None:
        _, _, E, K = LAYERS[case.layer]
        generator = torch.Generator().manual_seed(1)
        self.logits = torch.randn(case.tokens, E, generator=generator).to(device)
        chosen_TK, ids_TK = self.logits.topk(K)
        self.scores, self.ids = chosen_TK.softmax(-1), ids_TK.int()
        self.sort = expert_sort(self.ids, E)
        self.groups = self.sort.tokens_per_expert.tolist()


class OpProblem:
    """Providers of one operator on the same inputs.

    Args:
        case: the case; its mode determines whether gradients are computed.
        inputs: floating point tensors that the operator and its gradient are functions of.
        reference: plain torch; it is run in float64, or in float32 for shorter inputs.
        work: of the forward; a backward is counted as twice as much.
    """

    def __init__(
        self, case: Case, inputs: Mapping[str, torch.Tensor], reference: Operator, work: Work
    ) -> None:
        self.training = case.mode == "training"
        self.work = Work(3 * work.flops, 3 * work.bytes) if self.training else work
        self._inputs = dict(inputs)
        first = next(iter(inputs.values()))
        wide_dtype = torch.float64 if first.dtype == torch.float32 else torch.float32
        wide = {name: x.detach().to(wide_dtype).requires_grad_() for name, x in inputs.items()}
        expected = reference(**wide)
        generator = torch.Generator(first.device).manual_seed(2)
        self._grad = torch.randn(
            expected.shape, generator=generator, device=first.device, dtype=first.dtype
        )
        self._expected = {"output": expected.detach()}
        if self.training:
            grads = torch.autograd.grad(expected, list(wide.values()), self._grad.to(wide_dtype))
            self._expected |= {f"gradient of {n}": g for n, g in zip(wide, grads, strict=True)}

    def provider(self, name: str, operator: Operator) -> Provider:
        """Makes a candidate of a function of the inputs; `name` is for a failed check."""
        return lambda: Candidate(
            run=lambda: self._run(operator, self._inputs),
            check=lambda: self._check(name, operator),
            forward=(lambda: operator(**_leaves(self._inputs))) if self.training else None,
        )

    def dense(self, operator: Operator, **inputs: torch.Tensor) -> Provider:
        """Creates a candidate for the operation of a model without experts on as much data.

        Args:
            operator: an operator whose output has the same shape.
            inputs: inputs that replace those of the problem; none keeps them.
        """
        given = inputs or self._inputs
        return lambda: Candidate(
            run=lambda: self._run(operator, given),
            forward=(lambda: operator(**_leaves(given))) if self.training else None,
        )

    def ours(self, op: str, operator: Operator) -> dict[str, Provider]:
        """`ours` on the automatic backend, and `ours-<backend>` on every other one there is."""
        device = next(iter(self._inputs.values())).device
        automatic, *others = unimoe_kernels.available_backends(op, device)
        providers = {"ours": self.provider(f"ours ({automatic})", operator)}
        for backend in others:
            providers[f"ours-{backend}"] = self.provider(backend, _on_backend(operator, backend))
        return providers

    def _run(self, operator: Operator, inputs: Mapping[str, torch.Tensor]) -> None:
        if not self.training:
            with torch.no_grad():
                operator(**inputs)
            return
        leaves = _leaves(inputs)
        torch.autograd.grad(operator(**leaves), list(leaves.values()), self._grad)

    def _check(self, name: str, operator: Operator) -> None:
        leaves = _leaves(self._inputs)
        output = operator(**leaves)
        answers = {"output": output}
        if self.training:
            grads = torch.autograd.grad(output, list(leaves.values()), self._grad)
            answers |= {f"gradient of {n}": g for n, g in zip(leaves, grads, strict=True)}
        limit = TOLERANCE[output.dtype]
        for what, actual in answers.items():
            error = relative_error(actual, self._expected[what])
            assert error < limit, f"{name}: {what} has relative error {error:.2g}, limit {limit}"


def normal(*shape: int, like: torch.Tensor, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Draws normal values on the device of `like`; weights `[..., F, D]` give unit outputs."""
    generator = torch.Generator(like.device).manual_seed(seed)
    scale = shape[-1] ** -0.5 if len(shape) > 2 else 1.0
    x = torch.randn(*shape, generator=generator, device=like.device, dtype=dtype)
    return x.mul_(scale)


def _leaves(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: x.detach().requires_grad_() for name, x in inputs.items()}


def _on_backend(operator: Operator, backend: str) -> Operator:
    def run(**inputs: torch.Tensor) -> torch.Tensor:
        with unimoe_kernels.use_backend(backend):
            return operator(**inputs)

    return run
