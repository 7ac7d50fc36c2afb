"""Inputs that the tests share: supports of every form, tensors around them, adapted layers."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_ext import NeuroAdaConfig
from peft_ext.sparse.bases.neurons import is_convolution
from peft_ext.sparse.selection.plan import select_supports
from peft_ext.sparse.support import Support, offsets_from_counts
from peft_ext.tuners.neuroada import NeuroAdaConv, NeuroAdaLinear
from tests._models.layers import Kind


@dataclass(frozen=True)
class Shape:
    """Sizes of one product. `entries` is k for a table, or the number of entries of each row for a ragged support."""

    tokens: tuple[int, ...]
    fan_in: int
    rows: int
    entries: int | tuple[int, ...]


SHAPES = {
    "k1": Shape((11,), 9, 6, 1),
    "k2": Shape((11,), 9, 6, 2),
    "k20": Shape((19,), 33, 14, 20),
    "k=fan_in": Shape((11,), 7, 5, 7),
    "k1 one token": Shape((1,), 9, 6, 1),
    "k2 one token": Shape((1,), 9, 6, 2),
    "k2 eight tokens": Shape((8,), 9, 6, 2),
    "k2 nine tokens": Shape((9,), 9, 6, 2),
    "k1 no tokens": Shape((0,), 9, 6, 1),
    "k2 no tokens": Shape((2, 0), 9, 6, 2),
    "k1 3-D": Shape((3, 4), 9, 6, 1),
    "k2 3-D": Shape((3, 4), 9, 6, 2),
    "k2 vector": Shape((), 9, 6, 2),
    "one row": Shape((11,), 9, 1, 2),
    "one input": Shape((11,), 1, 6, 1),
    "empty table": Shape((11,), 9, 6, 0),
    "ragged": Shape((11,), 9, 6, (0, 3, 1, 9, 0, 2)),
    "ragged last row empty": Shape((2, 6), 9, 6, (1, 0, 0, 2, 4, 0)),
    "ragged one token": Shape((1,), 9, 6, (0, 3, 1, 9, 0, 2)),
    "ragged no tokens": Shape((0,), 9, 6, (0, 3, 1, 9, 0, 2)),
    "ragged empty": Shape((11,), 9, 6, (0,) * 6),
}

# Dtypes of the base (and x) and of the values: those that training meets.
DTYPES = [
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.float16, torch.float16),
]


@dataclass
class Inputs:
    """Arguments of one product; `grad` is the gradient of its output."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    values: Tensor
    support: Support
    grad: Tensor


def random_support(rows: int, fan_in: int, entries: int | Sequence[int], generator: torch.Generator) -> Support:
    counts = [entries] * rows if isinstance(entries, int) else list(entries)
    columns = [torch.randperm(fan_in, generator=generator)[:count].sort().values for count in counts]
    indices = torch.cat(columns).to(torch.int32)
    if isinstance(entries, int):
        return Support(indices.view(rows, entries), fan_in)
    return Support(indices, fan_in, offsets_from_counts(torch.tensor(counts)))


def make_inputs(
    shape: Shape,
    dtype: torch.dtype = torch.float64,
    values_dtype: torch.dtype | None = None,
    layout: str = "linear",
    seed: int = 0,
) -> Inputs:
    """Random inputs; layout `"conv1d"` stores the weight transposed, `"no bias"` leaves the bias out."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    support = random_support(shape.rows, shape.fan_in, shape.entries, generator)
    weight = draw(shape.rows, shape.fan_in).to(dtype)
    if layout == "conv1d":
        weight = weight.t().contiguous().t()
    return Inputs(
        x=draw(*shape.tokens, shape.fan_in).to(dtype).requires_grad_(),
        weight=weight,
        bias=None if layout == "no bias" else draw(shape.rows).to(dtype).requires_grad_(),
        values=draw(*support.indices.shape).to(values_dtype or dtype).requires_grad_(),
        support=support,
        grad=draw(*shape.tokens, shape.rows).to(dtype),
    )


def random_linear(
    fan_in: int, rows: int, kind: str = "linear", dtype: torch.dtype = torch.float32, seed: int = 0
) -> nn.Linear | Conv1D:
    """A frozen layer with random weight and bias; kind `"linear"` or `"conv1d"`."""
    make = (lambda: Conv1D(rows, fan_in)) if kind == "conv1d" else (lambda: nn.Linear(fan_in, rows))
    return Kind(make).build(dtype, seed)


def adapt(
    base_layer: nn.Module,
    k: int = 2,
    backend: str = "auto",
    adapters: Iterable[str] = ("default",),
    active: Sequence[str] | None = None,
    values_scale: float = 1.0,
    selection: str = "random",
    **options: object,
) -> NeuroAdaLinear | NeuroAdaConv:
    """
    The layer with adapters of random values, by default all of them active. Every adapter has its own random
    entries, so that those of several adapters overlap in part; with `selection="random_layer"` in uneven rows.
    """
    layer = (NeuroAdaConv if is_convolution(base_layer) else NeuroAdaLinear)(base_layer)
    for number, name in enumerate(adapters):
        config = NeuroAdaConfig(k=k, backend=backend, target_modules=["unused"], **options)
        support = select_supports({name: layer.base_matrix}, selection, k, seed=number)[name]
        layer.update_layer(name, config, support)
        generator = torch.Generator().manual_seed(number)
        values = layer.deltas[name].weight
        values.data.copy_(torch.randn(values.shape, generator=generator) * values_scale)
    layer.set_adapter(list(adapters) if active is None else list(active))
    return layer
