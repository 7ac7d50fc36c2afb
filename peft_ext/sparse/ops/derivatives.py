"""
Derivatives of operators, of any order: each is made of operators that have theirs here too. (What the paths compute is
linear in each argument, so there are only three: the product and its two gradients.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


Setup = Callable[[Any, Sequence[bool], Sequence[Any]], None]
Backward = Callable[[Any, Sequence[bool], Tensor], tuple[Tensor | None, ...]]
_RULES: dict[Any, tuple[Setup, Backward]] = {}


def register_derivative(operator: Any, setup: Setup, backward: Backward) -> None:
    """
    Tell autograd how to differentiate an operator.

    Args:
        operator: of `torch.library.custom_op`.
        setup: takes the context, which arguments need a gradient, and the arguments; saves what `backward` needs.
        backward: takes the context, which arguments need a gradient, and the output's gradient; gives the arguments'.
    """
    _RULES[operator] = setup, backward

    def registered_setup(ctx: Any, inputs: Any, output: Tensor) -> None:
        setup(ctx, ctx.needs_input_grad, inputs)

    def registered_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return backward(ctx, ctx.needs_input_grad, grad)

    operator.register_autograd(registered_backward, setup_context=registered_setup)


def save(ctx: Any, *arguments: Any) -> None:
    """Keep tensors and other arguments for `backward`."""
    ctx.save_for_backward(*(argument if isinstance(argument, Tensor) else None for argument in arguments))
    ctx.others = [None if isinstance(argument, Tensor) else argument for argument in arguments]


def saved(ctx: Any) -> list[Any]:
    """What [`save`] kept."""
    return [other if tensor is None else tensor for tensor, other in zip(ctx.saved_tensors, ctx.others, strict=True)]


def save_inputs(ctx: Any, needed: Sequence[bool], inputs: Sequence[Any]) -> None:
    """A `setup` for operators all of whose arguments `backward` needs."""
    save(ctx, *inputs)


def register_update(product: Any, grad_input: Any, grad_values: Any) -> None:
    """
    Tell autograd how to differentiate the operators of a sparse update. `rest` is the same for all of them: indices,
    offsets, transposed table, and what else they need.

    Args:
        product: `result + S(values) x` of `result`, `x`, `values` and `rest`.
        grad_input: `S(values)^T grad` of `grad`, the size of an item of x, the dtype of x, `values` and `rest`.
        grad_values: `grad^T x` at the support, of `grad`, `x` and `rest`.
    """

    def setup(ctx: Any, needed: Sequence[bool], inputs: Sequence[Any]) -> None:
        _, x, values, *rest = inputs
        save(ctx, x if needed[2] else None, x.shape[1:], x.dtype, values, *rest)

    def backward(ctx: Any, needed: Sequence[bool], grad: Tensor) -> tuple[Tensor | None, ...]:
        x, size, dtype, values, *rest = saved(ctx)
        grad_x = call(grad_input, grad, size, dtype, values, *rest) if needed[1] else None
        return grad, grad_x, of_values(needed[2], grad, x, values, rest), *(None,) * len(rest)

    def backward_grad_input(ctx: Any, needed: Sequence[bool], grad: Tensor) -> tuple[Tensor | None, ...]:
        outer, _, _, values, *rest = saved(ctx)
        grad_outer = call(product, torch.zeros_like(outer), grad, values, *rest) if needed[0] else None
        return grad_outer, None, None, of_values(needed[3], outer, grad, values, rest), *(None,) * len(rest)

    def backward_grad_values(ctx: Any, needed: Sequence[bool], grad: Tensor) -> tuple[Tensor | None, ...]:
        outer, x, *rest = saved(ctx)
        grad_outer = call(product, torch.zeros_like(outer), x, grad, *rest) if needed[0] else None
        grad_x = call(grad_input, outer, x.shape[1:], x.dtype, grad, *rest) if needed[1] else None
        return grad_outer, grad_x, *(None,) * len(rest)

    def of_values(needed: bool, grad: Tensor, x: Tensor, values: Tensor, rest: Sequence[Any]) -> Tensor | None:
        return call(grad_values, grad, x, *rest).to(values.dtype) if needed else None

    register_derivative(product, setup, backward)
    register_derivative(grad_input, save_inputs, backward_grad_input)
    register_derivative(grad_values, save_inputs, backward_grad_values)


def is_transformed() -> bool:
    """Whether a transform of `torch.func` is at work; a compiler sees through them."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def call(operator: Any, *arguments: Any) -> Tensor:
    """An operator with its derivative, also inside transforms of `torch.func`, which do not enter the autograd of a
    registered operator."""
    return _Transformable.apply(operator, *arguments) if is_transformed() else operator(*arguments)


class _Transformable(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(operator: Any, *arguments: Any) -> Tensor:
        return operator(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.operator, *arguments = inputs
        _RULES[ctx.operator][0](ctx, ctx.needs_input_grad[1:], arguments)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, *_RULES[ctx.operator][1](ctx, ctx.needs_input_grad[1:], grad)
