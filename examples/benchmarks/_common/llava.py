"""A LLaVA-shaped model with random weights, a batch for it, and a check of MoReS on it before anything is timed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from peft_ext import MoReSConfig

from .models import check_heads


@dataclass(frozen=True)
class LlavaShape:
    """Sizes of the model and of the batch; an image has `side`² tokens."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocab: int
    batch: int
    side: int
    text_tokens: int

    def __post_init__(self) -> None:
        check_heads(self.hidden, self.heads)


def llava(shape: LlavaShape, dtype: torch.dtype, device: torch.device) -> LlavaForConditionalGeneration:
    """The model, frozen, in training mode. Its vision tower is small: it takes part in every method's step alike."""
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        pad_token_id=0,
    )
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=4 * shape.side,
        patch_size=4,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=shape.vocab - 1,
        image_seq_length=shape.side**2,
        vision_feature_layer=-1,
    )
    return LlavaForConditionalGeneration(config).to(device, dtype).requires_grad_(False).train()


def llava_batch(shape: LlavaShape, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Images followed by text; the loss is on the text's second half."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(1, shape.vocab - 1, (shape.batch, shape.text_tokens), generator=generator)
    image = torch.full((shape.batch, shape.side**2), shape.vocab - 1)
    ids = torch.cat([text[:, :1], image, text[:, 1:]], dim=1)
    labels = ids.clone()
    labels[:, : -(shape.text_tokens // 2)] = -100
    pixels = torch.randn(shape.batch, 3, 4 * shape.side, 4 * shape.side, generator=generator).to(dtype)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "pixel_values": pixels}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def check_steering(dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """
    Compare MoReS on a small model with the formula written out at each chosen token.

    Returns:
        `dict[str, float]`: the largest differences of logits and of the gradients of W, relative to the largest value.

    Raises:
        `RuntimeError`: if one of them is more than rounding.
    """
    shape = LlavaShape(32, 48, 3, 4, 64, 2, 4, 8)
    batch = llava_batch(shape, dtype, device)
    model = get_peft_model(llava(shape, dtype, device), MoReSConfig(rank=2, token_ratio=0.25))
    values = [p for p in model.parameters() if p.requires_grad]
    for value in values:
        torch.nn.init.normal_(value, std=0.3)
    actual = model(**batch)
    actual.loss.backward()
    visual = (batch["input_ids"] == shape.vocab - 1).nonzero().tolist()
    per_row = shape.side**2
    chosen = [place for i, place in enumerate(visual) if i % per_row < 2 or i % per_row >= per_row - 2]
    base = llava(shape, dtype, device)
    copies: dict[str, Any] = {}
    for index in range(shape.layers - 1):
        name = f"base_model.model.model.language_model.layers.{index}.steering.mores_steering.default"
        steering = model.get_submodule(name)
        parts = {key: p.detach().clone().requires_grad_() for key, p in steering.named_parameters()}
        copies[name] = (steering, parts)

        def write_out(module: Any, args: Any, output: Tensor, parts: dict[str, Tensor] = parts) -> Tensor:
            first = parts["raw_up"][:, 0] / parts["raw_up"][:, 0].norm()
            second = parts["raw_up"][:, 1] - first * (first @ parts["raw_up"][:, 1])
            rotation = torch.stack([first, second / second.norm()], dim=1)
            new = output.clone()
            for row, token in chosen:
                h = output[row, token].to(rotation.dtype)
                inner = parts["weight"] @ h + parts["bias"] - rotation.T @ h
                new[row, token] = (h + rotation @ inner).to(output.dtype)
            return new

        base.get_decoder().layers[index].register_forward_hook(write_out)
    expected = base(**batch)
    expected.loss.backward()

    def difference(a: Tensor, b: Tensor) -> float:
        return ((a - b).abs().max() / b.abs().max()).item()

    found = {
        "logits": difference(actual.logits.float(), expected.logits.float()),
        "gradients": max(difference(s.weight.grad, parts["weight"].grad) for s, parts in copies.values()),
    }
    limit = 1e-3 if dtype == torch.float32 else 0.1
    if not all(value <= limit for value in found.values()):
        raise RuntimeError(f"MoReS differs from its formula by {found}, more than {limit}: nothing is timed")
    return found
