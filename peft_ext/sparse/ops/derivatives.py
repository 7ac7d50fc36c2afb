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
