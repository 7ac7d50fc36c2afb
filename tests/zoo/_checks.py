"""What holds for an adapter on every architecture."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn

from peft_ext.sparse.config import SparseConfig
from peft_ext.sparse.layers import SparseLayer

from ._factory import Architecture


def check(name: str, architecture: Architecture, config: SparseConfig) -> None:
    """
    Adapt a tiny model, take a step of AdamW with weight decay, and merge.

    Raises:
        `AssertionError`: if the new adapter is no identity, a value gets no gradient, anything changes but the values,
            or the merged model computes something else, in a forward pass or in generation.
    """
    base, batch = architecture.build(name), architecture.batch()
    with torch.no_grad():
        expected = _output(base(**batch))
    before = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    generates = architecture.kind == "decoder"

    model = get_peft_model(base, config)
    with torch.no_grad():
        _assert_close(_output(model(**batch)), expected, "identity at the start")

    values = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(values.values(), lr=0.05, weight_decay=0.1)
    output = _output(model(**batch))
    (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    idle = {key for key in values if re.search(architecture.idle, key)}
    without = [key for key, value in values.items() if value.grad is None or not value.grad.any()]
    without = sorted(set(without) - idle)
    assert not without, f"no gradient for {without}"
    optimizer.step()

    layers = {key: layer for key, layer in model.get_base_model().named_modules() if isinstance(layer, SparseLayer)}
    assert layers and all(layer.called or re.search(architecture.idle, key) for key, layer in layers.items())
    with torch.no_grad():
        trained = _output(model(**batch))
        generated = _generated(model, batch) if generates else None
        assert not torch.allclose(trained, expected), "training changes nothing"
        _assert_only_values_changed(base, before)
        merged = copy.deepcopy(model)
        merged.merge_adapter()
        _assert_close(_output(merged(**batch)), trained, "merged")
        if generated is not None:
            _assert_close(_generated(merged, batch), generated, "merged, in generation")
        for key, layer in layers.items():
            _assert_written_at_entries(merged.get_base_model().get_submodule(key), layer)
        merged.unmerge_adapter()
        _assert_only_values_changed(merged.get_base_model(), before)


def _output(output: Any) -> Tensor:
    """Logits, or what a model without a head gives first."""
    found = output.logits if hasattr(output, "logits") else output[0]
    assert isinstance(found, Tensor)
    return found


def _generated(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The logits of three new tokens, with the model's own kind of cache: `[samples, 3, vocabulary]`."""
    torch.manual_seed(3)
    result = model.generate(  # type: ignore[operator]
        **batch, min_new_tokens=3, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    return torch.stack(result.logits, 1)


def _assert_close(found: Tensor, expected: Tensor, what: str) -> None:
    error = float((found - expected).abs().max() / expected.abs().max().clamp(min=1.0))
    assert error <= 1e-4, f"{what}: off by {error:.1e} of the largest output"


def _assert_only_values_changed(base: nn.Module, before: dict[str, Tensor]) -> None:
    now = {key.replace(".base_layer", ""): tensor for key, tensor in base.state_dict().items() if "_delta." not in key}
    assert now.keys() == before.keys()
    changed = [key for key, tensor in before.items() if not torch.equal(now[key], tensor)]
    assert not changed, f"changed: {changed}"


def _assert_written_at_entries(merged: Any, layer: SparseLayer) -> None:
    """Merging has added the values at the entries, and has touched nothing else."""
    delta = layer.deltas["default"]
    expected = layer.base_matrix().clone()
    entries = delta.support.gather(expected) + delta.weight
    delta.support.scatter_(expected, entries)
    torch.testing.assert_close(merged.base_matrix(), expected)
    selected = torch.zeros_like(expected, dtype=torch.bool)
    delta.support.scatter_(selected, torch.ones_like(entries, dtype=torch.bool))
    assert torch.equal(merged.base_matrix()[~selected], layer.base_matrix()[~selected])
