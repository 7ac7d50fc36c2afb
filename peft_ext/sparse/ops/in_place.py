"""The bypass added into the base layer's output itself, so that a layer has one output in memory and not two."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import gpu
from .bypass import sparse_grad_input, sparse_grad_values


PLAIN = (Tensor, torch.nn.Parameter)


class _AddInPlace(torch.autograd.Function):
    """
    `result += S x` and its gradients straight through the kernels: `torch.library` has no autograd for operators that
    mutate, and its dispatch would cost more time on the CPU than the launches.
    """

    @staticmethod
    def forward(ctx: Any, result: Tensor, x: Tensor, values: Tensor, *support: Any) -> Tensor:
        flat, indices, offsets = result.view(-1, result.shape[-1]), support[0], support[1]
        gpu.kernels().add(flat, x.reshape(-1, x.shape[-1]), values, indices, offsets, flat)
        ctx.mark_dirty(result)
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, values, *support)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, values, *support = ctx.saved_tensors
        indices, offsets, entries, ends = support
        flat = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_values = None
        # With `create_graph` through operators that can be differentiated again; and a gradient of `is_grads_batched`
        # has no memory of its own.
        if torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(grad):
            if ctx.needs_input_grad[1]:
                grad_x = sparse_grad_input(flat, ctx.x_shape[-1:], ctx.x_dtype, values, *support, None, [])
                grad_x = grad_x.view(ctx.x_shape)
            if ctx.needs_input_grad[2]:
                grad_values = sparse_grad_values(flat, x.reshape(-1, x.shape[-1]), *support, None, [])
                grad_values = grad_values.to(values.dtype)
            return grad, grad_x, grad_values, None, None, None, None
        kernels = gpu.kernels()
        rows = kernels.rows_of(indices, offsets)
        if ctx.needs_input_grad[1]:
            grad_x = torch.empty(ctx.x_shape, dtype=ctx.x_dtype, device=grad.device)
            kernels.grad_input(flat, values, indices, rows, entries, ends, grad_x.view(-1, grad_x.shape[-1]))
        if ctx.needs_input_grad[2]:
            grad_values = kernels.grad_values(flat, x.reshape(-1, x.shape[-1]), indices, rows).to(values.dtype)
        return grad, grad_x, grad_values, None, None, None, None


def _owner(result: Tensor) -> Tensor:
    """The tensor whose memory `result` is. Linear layers return a view of their product with a bias, and autograd
    would copy if the view were overwritten and not the product."""
    return result._base if result._is_view() and result._base is not None else result


def may_add_in_place(result: Tensor, x: Tensor, values: Tensor) -> bool:
    """
    Whether nobody can notice that a fresh `result` changes: no part of something larger, no leaf, no subclass and no
    mode that may keep what operators return (selective checkpointing does), no compiler and no transform of
    `torch.func`, which work on the functional operator. CPU tensors stay on the functional path.
    """
    if torch.compiler.is_compiling() or not gpu.usable(result, x, values):
        return False
    if result.numel() == 0 or values.numel() == 0 or any(type(t) not in PLAIN for t in (result, x, values)):
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return False
    owner = _owner(result)
    return (
        result.is_contiguous()
        and owner.is_contiguous()
        and (owner.numel(), owner.shape[-1:]) == (result.numel(), result.shape[-1:])
        and not (owner.is_leaf and owner.requires_grad)
    )


def add_in_place(
    result: Tensor, x: Tensor, values: Tensor, indices: Tensor, offsets: Tensor | None, transposed_entries: Tensor,
    transposed_offsets: Tensor,
) -> Tensor:  # fmt: skip
    """
    [`bypass`] that overwrites the memory of `result`, which nothing else may have saved: a linear layer's output is
    one that its own backward does not need. Ask [`may_add_in_place`] first.
    """
    support = (indices, offsets, transposed_entries, transposed_offsets)
    return _AddInPlace.apply(_owner(result), x, values, *support).view(result.shape)
