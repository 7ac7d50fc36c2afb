"""Nothing is timed before it is right: NeuroAda's outputs and gradients against the dense reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from peft_ext import NeuroAdaConfig
from peft_ext.sparse.ops.reference import sparse_product

from .methods import share
from .models import LINEARS, Shape, SingleLinear, llama, token_batch
from .tables import table


BACKENDS = ("bypass", "folded", "dense")
SIZES = (1, 20)
# Largest error over the largest entry of the reference. fp32 sums in another order differ by some 1e-6; a bf16 weight
# that holds its value is rounded to 2^-9 of itself, a bf16 output once more.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


class GateError(RuntimeError):
    """A backend disagrees with the reference: its step time means nothing."""


@dataclass(frozen=True)
class Check:
    """How far one backend is from the reference."""

    case: str
    backend: str
    k: int
    output: float
    values_gradient: float
    input_gradient: float
    base_intact: bool
    backend_ran: bool
    tolerance: float

    @property
    def passed(self) -> bool:
        worst = max(self.output, self.values_gradient, self.input_gradient)
        return self.base_intact and self.backend_ran and worst <= self.tolerance  # a NaN compares false and fails


class Operators(TorchDispatchMode):
    """The names of the operators that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def error(result: Tensor, reference: Tensor) -> float:
    """Largest deviation relative to the largest entry of the reference; NaN if anything is NaN."""
    reference = reference.double()
    return ((result.double() - reference).abs().max() / reference.abs().max()).item()


def worst_error(results: Sequence[Tensor], references: Sequence[Tensor]) -> float:
    errors = [error(result, reference) for result, reference in zip(results, references, strict=True)]
    return torch.tensor(errors).max().item()


def values_of(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if "neuroada_delta" in name]


def with_neuroada(base: nn.Module, k: int, backend: str, targets: Sequence[str]) -> PeftModel:
    """NeuroAda with values as large as the weights they are added to, alike for every backend."""
    model = get_peft_model(share(base), NeuroAdaConfig(k=k, backend=backend, target_modules=list(targets)))
    generator = torch.Generator().manual_seed(0)
    for value in values_of(model):
        noise = torch.randn(value.shape, generator=generator) * base_scale(base)
        value.data.copy_(noise)
    return model.train()


def base_scale(base: nn.Module) -> float:
    weights = [module.weight for module in base.modules() if isinstance(module, nn.Linear)]
    return torch.stack([weight.float().std() for weight in weights]).mean().item()


def logits(model: nn.Module, embedded: Tensor) -> Tensor:
    return model(inputs_embeds=embedded).logits


def layer_output(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def oracle_output(model: nn.Module, x: Tensor) -> Tensor:
    """What the adapted layer should compute, from its tensors alone: none of its own code is run."""
    proj = model.get_submodule("base_model.model.proj")
    delta = proj.get_submodule("neuroada_delta.default")
    return sparse_product(x, proj.get_submodule("base_layer").weight, None, delta.weight, delta.indices)


Run = Callable[[nn.Module, Tensor], Tensor]


def outcome(model: nn.Module, run: Run, inputs: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
    """Output, gradients of the values and gradient of the input, for a fixed random upstream gradient."""
    inputs = inputs.detach().requires_grad_(True)
    out = run(model, inputs)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    *value_gradients, input_gradient = torch.autograd.grad(out, [*values_of(model), inputs], upstream)
    return out.detach(), value_gradients, input_gradient


def compare(case: str, base: nn.Module, inputs: Tensor, targets: Sequence[str], run: Run, oracle: Run) -> list[Check]:
    """Every backend and size on one model, against the oracle on the same base weights."""
    checks = []
    before = [p.detach().clone() for p in base.parameters()]
    for k in SIZES:
        expected = outcome(with_neuroada(base, k, "reference", targets), oracle, inputs)
        for backend in BACKENDS:
            result = outcome(with_neuroada(base, k, backend, targets), run, inputs)
            with Operators() as operators:  # by itself: on a GPU, a mode that watches rules out adding in place
                outcome(with_neuroada(base, k, backend, targets), run, inputs)
            checks.append(
                Check(
                    case=case,
                    backend=backend,
                    k=k,
                    output=error(result[0], expected[0]),
                    values_gradient=worst_error(result[1], expected[1]),
                    input_gradient=error(result[2], expected[2]),
                    base_intact=all(torch.equal(old, p) for old, p in zip(before, base.parameters(), strict=True)),
                    # A layer takes the bypass where the backend asked for can't be used; that is not to happen here.
                    backend_ran=any(name.startswith(f"peft_ext::{backend}_") for name in operators.names),
                    tolerance=TOLERANCE[inputs.dtype],
                )
            )
    return checks


def gate(shape: Shape, dtype: torch.dtype, device: torch.device) -> list[Check]:
    """Checks of one layer of the benchmark's own shape and of a small model with every target adapted."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(shape.batch * shape.tokens, shape.hidden, generator=generator).to(device, dtype)
    layer = SingleLinear(shape.hidden, shape.intermediate, dtype, device)
    small = Shape(hidden=64, intermediate=176, layers=2, heads=4, vocab=128, batch=2, tokens=32)
    model = llama(small, dtype, device)
    embedded = model.get_input_embeddings()(token_batch(small, device)["input_ids"])  # type: ignore[operator]
    return [
        *compare("layer", layer, tokens, ["proj"], layer_output, oracle_output),
        *compare("model", model, embedded, LINEARS, logits, logits),
    ]


def require(checks: Sequence[Check]) -> None:
    """Refuse to go on if any check failed."""
    failed = [asdict(entry) for entry in checks if not entry.passed]
    if failed:
        raise GateError(f"NeuroAda differs from the dense reference, so nothing is timed: {failed}")


def gate_table(checks: Sequence[Check]) -> str:
    return table(
        [
            {
                "gate": entry.case,
                "backend": entry.backend,
                "k": str(entry.k),
                "output": f"{entry.output:.1e}",
                "d values": f"{entry.values_gradient:.1e}",
                "d input": f"{entry.input_gradient:.1e}",
                "base intact": "yes" if entry.base_intact else "NO",
                "backend ran": "yes" if entry.backend_ran else "NO",
                "passed": "yes" if entry.passed else "NO",
            }
            for entry in checks
        ]
    )
