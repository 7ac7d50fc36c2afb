"""Shapes, dtypes and strides that the kernels are tested on, and what they must give."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peft_ext.sparse.support import Support

from ..._asserts import dense_update
from ..._inputs import Shape, random_support


# Odd sizes around blocks of 4 tokens, 4 neurons, 2 entries of a neuron, 8 entries of a support and 4 of a row.
SHAPES = {
    "one token": Shape((1,), 9, 6, 2),
    "one of all": Shape((1,), 1, 1, 1),
    "k1": Shape((7,), 9, 6, 1),
    "k2": Shape((5,), 9, 9, 2),
    "k above the block": Shape((6,), 11, 5, 7),
    "k = fan-in": Shape((3,), 5, 3, 5),
    "k12": Shape((5,), 13, 3, 12),
    "k4": Shape((9,), 9, 5, 4),
    "more rows than inputs": Shape((4,), 3, 17, 2),
    "whole blocks": Shape((8,), 16, 8, 2),
    "one row": Shape((6,), 9, 1, 3),
    "one input": Shape((5,), 1, 7, 1),
    "ragged": Shape((7,), 9, 6, (0, 3, 1, 9, 0, 2)),
    "ragged, last rows empty": Shape((5,), 9, 6, (1, 4, 0, 2, 0, 0)),
    "ragged, one token": Shape((1,), 9, 5, (2, 0, 3, 1, 0)),
}
Dtypes = tuple[torch.dtype, torch.dtype, torch.dtype]  # of the result, of x, of the values
DTYPES: list[Dtypes] = [
    (torch.float32, torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16, torch.float32),
    (torch.float16, torch.float16, torch.float16),
    (torch.bfloat16, torch.float32, torch.float32),  # autocast
]
LAYOUTS = ("transposed", "sliced", "expanded")


def each_in_a_layout(shapes: Iterable[str], dtypes: Sequence[Dtypes]) -> list[tuple[str, Dtypes, str]]:
    """Every shape with every triple of dtypes, in one layout each, which change from one to the next: in the
    interpreter all layouts of all would take a fifth of the whole suite's time. A GPU has the product."""
    return [
        (shape, triple, LAYOUTS[(row + column) % len(LAYOUTS)])
        for row, shape in enumerate(shapes)
        for column, triple in enumerate(dtypes)
    ]


def laid_out(matrix: Tensor, layout: str) -> Tensor:
    """The matrix in other strides, beside NaN where memory lies between; "expanded": its first row repeated."""
    if layout == "transposed":
        return matrix.t().contiguous().t()
    if layout == "sliced":
        wide = matrix.new_full((2 * matrix.shape[0] + 1, matrix.shape[1] + 3), torch.nan)
        part = wide[1::2, 2:-1]
        return part.copy_(matrix)
    return matrix[:1].expand(matrix.shape) if layout == "expanded" else matrix


@dataclass
class Case:
    """`result + S x` with `grad` arriving from above; all activations in the layout of the case."""

    result: Tensor
    x: Tensor
    values: Tensor
    support: Support
    grad: Tensor

    @classmethod
    def draw(cls, shape: Shape, dtypes: tuple[torch.dtype, ...], layout: str, device: str = "cpu") -> "Case":
        generator = torch.Generator().manual_seed(0)
        support = random_support(shape.rows, shape.fan_in, shape.entries, generator)

        def draw(width: int, dtype: torch.dtype) -> Tensor:
            return laid_out(torch.randn(*shape.tokens, width, generator=generator).to(device, dtype), layout)

        result_dtype, x_dtype, values_dtype = dtypes
        values = torch.randn(support.indices.shape, generator=generator).to(device, values_dtype)
        return cls(
            draw(shape.rows, result_dtype).requires_grad_(),
            draw(shape.fan_in, x_dtype).requires_grad_(),
            values.requires_grad_(),
            support.to(device),
            draw(shape.rows, result_dtype),
        )

    def support_tensors(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        return (self.support.indices, self.support.offsets, *self.support.transposed())

    def expected(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Each output with the sum of the magnitudes of its terms, by dense matrices in fp64 on the CPU."""
        result, x, values, grad = (t.detach().cpu().double() for t in (self.result, self.x, self.values, self.grad))
        support = self.support.to("cpu")
        exact = []
        for sign in (lambda t: t, torch.abs):
            update = dense_update(sign(values), support)
            exact.append(
                {
                    "output": sign(result) + sign(x) @ update.t(),
                    "gradient of result": sign(grad),
                    "gradient of x": sign(grad) @ update,
                    "gradient of values": support.gather(sign(grad).t() @ sign(x)),
                }
            )
        return {name: (value, exact[1][name]) for name, value in exact[0].items()}


def assert_rounded_once(result: Tensor, exact: Tensor, magnitude: Tensor, dtype: torch.dtype) -> None:
    """
    `result` is what fp32 sums give, rounded once to its dtype: within one unit in the last place of the exact value,
    half of one for the rounding and an fp32 sum's error, which is relative to the magnitude of its terms.
    """
    assert result.dtype == dtype and result.shape == exact.shape
    result = result.detach().cpu()
    information = torch.finfo(dtype)
    _, exponent = torch.frexp(exact)
    spacing = torch.ldexp(torch.full_like(exact, information.eps), exponent - 1).clamp_min(information.tiny)
    bound = 0.5 * spacing + 64 * torch.finfo(torch.float32).eps * magnitude
    assert ((result.double() - exact).abs() <= bound).all()  # not `any(>)`: a NaN must not pass


def assert_case_correct(case: Case, out: Tensor) -> None:
    """`out` was computed from the case: it and the gradients through it are fp32 sums rounded once."""
    gradients = torch.autograd.grad(out, (case.result, case.x, case.values), case.grad)
    results = {
        "output": (out, case.result.dtype),
        "gradient of result": (gradients[0], case.result.dtype),
        "gradient of x": (gradients[1], case.x.dtype),
        "gradient of values": (gradients[2], case.values.dtype),
    }
    for name, (exact, magnitude) in case.expected().items():
        result, dtype = results[name]
        assert_rounded_once(result, exact, magnitude, dtype)
