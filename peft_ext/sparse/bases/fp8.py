"""Weights of linear layers and fused experts that transformers keeps as 8-bit floats with a scale for each block
(`FineGrainedFP8Config`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...hf.internals import QuantizationBackend
from .experts import ExpertBank, scale_of


class FineGrainedFP8Backend(QuantizationBackend):
    """Reads such weights; PEFT has no backend for them. Merging puts dense ones in their place."""

    supports_merge = True
    backend_name = "fine-grained fp8"
    layer_type = "linear"

    def get_base_weight(self, base_layer: Any) -> Tensor:
        """A dequantised copy, fp32."""
        scale, weight = scale_of(base_layer), base_layer.weight.detach()
        assert scale is not None
        holder = base_layer.owner if isinstance(base_layer, ExpertBank) else base_layer
        return dequantised(weight, scale.detach(), holder.block_size)

    def set_base_weight(self, peft_layer: Any, weight_data: Tensor) -> None:
        raise TypeError(
            "requantize=True: weights in fine-grained fp8 can't be quantised again. Merge without `requantize`; the "
            "merged layers are dense."
        )


def dequantised(weight: Tensor, scale: Tensor, block_size: tuple[int, int] | None) -> Tensor:
    """
    8-bit floats times the scales of their blocks.

    Args:
        weight (`torch.Tensor`): `[..., rows, columns]`.
        scale (`torch.Tensor`): `[..., blocks of rows, blocks of columns]`, or one number.
        block_size (`tuple[int, int]`, *optional*): rows and columns of a block, of which the last may be smaller.
            Without it the blocks are equal parts, such as an expert's gate and its other half.
    """
    scale = scale.to(torch.float32)
    for dim in (-2, -1) if scale.dim() else ():
        size = weight.shape[dim] // scale.shape[dim] if block_size is None else block_size[dim]
        scale = scale.repeat_interleave(size, dim).narrow(dim, 0, weight.shape[dim])
    return weight.to(torch.float32) * scale


def fp8_backend(base_layer: Any) -> FineGrainedFP8Backend | None:
    """Access to a layer's weight if it is such a one."""
    return None if scale_of(base_layer) is None or is_sealed(base_layer) else FineGrainedFP8Backend()


def is_sealed(base_layer: Any) -> bool:
    """Whether a layer of such weights computes something else than a linear layer, as `FP8GroupedLinear` does."""
    known = isinstance(base_layer, ExpertBank) or type(base_layer).__name__ == "FP8Linear"
    return scale_of(base_layer) is not None and not known
