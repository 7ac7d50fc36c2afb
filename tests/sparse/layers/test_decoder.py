"""Adapters in torch's decoder, whose cross-attention reads another sequence than it writes."""

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_ext import NeuroAdaConfig
from peft_ext.sparse.bases.projection import Projection
from peft_ext.sparse.layers import SparseLayer

from .._asserts import with_dense_updates


WIDTH, TARGET, MEMORY = 8, 5, 7


def _decoder():
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True, dtype=torch.float64)
    return nn.TransformerDecoder(layer, 2).eval()


def _inputs():
    generator = torch.Generator().manual_seed(1)
    target = torch.randn(3, TARGET, WIDTH, generator=generator, dtype=torch.float64)
    memory = torch.randn(3, MEMORY, WIDTH, generator=generator, dtype=torch.float64)
    causal = nn.Transformer.generate_square_subsequent_mask(TARGET, dtype=torch.float64)
    padding = torch.zeros(3, MEMORY, dtype=torch.bool)
    padding[0, 4:] = True
    return (target, memory), {"tgt_mask": causal, "memory_key_padding_mask": padding}


@pytest.mark.parametrize(
    "targets", ["all-neurons", ["multihead_attn"], ["self_attn", "multihead_attn", "linear1"]], ids=str
)
def test_a_decoder_computes_what_dense_weights_would(targets):
    config = NeuroAdaConfig(k=2, target_modules=targets, init_weights=False)
    model = get_peft_model(_decoder(), config, autocast_adapter_dtype=False).eval()
    dense, (args, options) = with_dense_updates(model, _decoder()), _inputs()
    expected = dense(*args, **options)
    assert not torch.allclose(expected, _decoder()(*args, **options))
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with context():
            torch.testing.assert_close(model(*args, **options), expected)
    torch.testing.assert_close(copy.deepcopy(model).merge_and_unload()(*args, **options), expected)
    expected.square().sum().backward()
    model(*args, **options).square().sum().backward()
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, SparseLayer) and not isinstance(layer.get_base_layer(), Projection):
            delta = layer.deltas["default"]
            torch.testing.assert_close(delta.weight.grad, delta.support.gather(dense.get_submodule(name).weight.grad))
