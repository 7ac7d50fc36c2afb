"""A method on a base model, as the verbs take it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tests.contract._common import ALL_METHODS, METHODS, add, fill


class Attending(nn.Module):
    """Self-attention whose projections are parts of one weight and one bias."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            nn.init.normal_(self.attention.in_proj_bias)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return output


@dataclass(frozen=True)
class Case:
    """A method, new copies of a base model, inputs for it, a folder for files, and options of the method there."""

    method: str
    base: Callable[[], Any]
    inputs: dict[str, Tensor]
    folder: Path
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def is_sparse(self) -> bool:
        return self.method in METHODS

    def config(self, **options: Any) -> Any:
        return ALL_METHODS[self.method](**{**self.options, **options})

    def adapted(self, base: Any = None, seed: int = 1, **options: Any) -> Any:
        """With values in the adapter, and in a head that is trained whole."""
        model = get_peft_model(self.base() if base is None else base, self.config(**options))
        for parameter in head_of(model):
            parameter.data += 0.1
        return fill(model.eval(), seed=seed)

    def two(self, **options: Any) -> Any:
        """Adapters `default`, which is active, and `other`."""
        return add(self.adapted(), "other", self.method, **{**self.options, **options})

    def saved(self, seed: int = 1) -> Any:
        """An adapter in `folder / "adapter"` and its base in `folder / "base"`; returns the adapted model."""
        self.base().save_pretrained(self.folder / "base")
        model = self.adapted(AutoModelForCausalLM.from_pretrained(self.folder / "base"), seed)
        model.save_pretrained(self.folder / "adapter")
        return model

    def logits(self, model: Any, **options: Any) -> Tensor:
        with torch.no_grad():
            found = model(**self.inputs, **options)
        return found if isinstance(found, Tensor) else found.logits


def head_of(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if ".modules_to_save." in name]


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def case_of(method: str, name: str, tiny: Any, inputs_of: Any, folder: Path) -> Case:
    """On a tiny model of the fixtures `tiny` and `inputs_of`, or on `"attention"`."""
    if name == "attention":
        x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
        return Case(method, lambda: Attending().eval(), {"x": x}, folder, {"target_modules": ["attention"]})
    return Case(method, lambda: tiny(name), inputs_of(name), folder)
