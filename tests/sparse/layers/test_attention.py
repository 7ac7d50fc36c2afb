"""Adapted `nn.MultiheadAttention`: against torch's own with dense weights, and in encoders."""

import itertools

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_ext import NeuroAdaConfig
from peft_ext.sparse.bases.projection import Projection
from peft_ext.tuners.neuroada import NeuroAdaLinear, NeuroAdaMultiheadAttention

from .._asserts import with_dense_updates


WIDTH, HEADS, BATCH, QUERIES, KEYS = 8, 2, 3, 5, 7
OPTIONS = {
    "packed": {},
    "sequence first": {"batch_first": False},
    "no bias": {"bias": False},
    "unpacked": {"kdim": 6, "vdim": 10},
    "extra keys": {"add_bias_kv": True, "add_zero_attn": True},
    "unpacked, extra keys": {"kdim": 6, "vdim": 10, "add_bias_kv": True, "add_zero_attn": True, "bias": False},
}
EVERY_FORM = pytest.mark.parametrize("form", OPTIONS)


def _attention(form="packed", seed=0):
    torch.manual_seed(seed)
    attention = nn.MultiheadAttention(WIDTH, HEADS, dtype=torch.float64, **{"batch_first": True, **OPTIONS[form]})
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.5)
    return attention


def _adapted(attention, **options):
    holder = nn.ModuleDict({"attention": attention})
    config = NeuroAdaConfig(k=2, target_modules=["attention"], init_weights=False, **options)
    model = get_peft_model(holder, config, autocast_adapter_dtype=False)
    return model, model.base_model.model["attention"]


def _pair(form="packed", trainable=False):
    """An adapted attention, and torch's own with the adapters in its weights."""
    model, adapted = _adapted(_attention(form))
    dense = with_dense_updates(model, nn.ModuleDict({"attention": _attention(form)}))["attention"]
    return adapted, dense.requires_grad_(trainable)


def _inputs(form="packed"):
    generator = torch.Generator().manual_seed(1)

    def draw(tokens, width):
        x = torch.randn(BATCH, tokens, width, generator=generator, dtype=torch.float64)
        return x if OPTIONS[form].get("batch_first", True) else x.transpose(0, 1)

    options = OPTIONS[form]
    return draw(QUERIES, WIDTH), draw(KEYS, options.get("kdim", WIDTH)), draw(KEYS, options.get("vdim", WIDTH))


def _masks():
    generator = torch.Generator().manual_seed(2)
    padding = torch.zeros(BATCH, KEYS, dtype=torch.bool)
    padding[0, 5:] = True
    return {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "float padding": {"key_padding_mask": torch.randn(BATCH, KEYS, generator=generator, dtype=torch.float64)},
        "boolean": {"attn_mask": torch.rand(QUERIES, KEYS, generator=generator) > 0.8},
        "float per head": {
            "attn_mask": torch.randn(BATCH * HEADS, QUERIES, KEYS, generator=generator, dtype=torch.float64)
        },
        "both": {"attn_mask": torch.rand(QUERIES, KEYS, generator=generator) > 0.8, "key_padding_mask": padding},
    }


@pytest.mark.parametrize("mask", _masks())
@EVERY_FORM
@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
def test_outputs_and_weights_are_those_of_torch_with_dense_weights(form, mask):
    adapted, dense = _pair(form)
    for need_weights, average in itertools.product((True, False), (True, False)):
        options = {"need_weights": need_weights, "average_attn_weights": average, **_masks()[mask]}
        outputs, weights = adapted(*_inputs(form), **options)
        expected, expected_weights = dense(*_inputs(form), **options)
        torch.testing.assert_close(outputs, expected)
        assert (weights is None) == (expected_weights is None)
        if weights is not None:
            torch.testing.assert_close(weights, expected_weights)


@EVERY_FORM
def test_gradients_are_those_of_dense_weights_at_the_entries(form):
    adapted, dense = _pair(form, trainable=True)
    x = [tensor.clone().requires_grad_() for tensor in _inputs(form)]
    y = [tensor.clone().requires_grad_() for tensor in _inputs(form)]
    adapted(*x)[0].square().sum().backward()
    dense(*y)[0].square().sum().backward()
    for mine, theirs in zip(x, y, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    for name, layer in adapted.parts.items():
        projection = Projection(dense, name)
        whole = projection.rows_of(dense.get_parameter(projection.parameter_name).grad)
        delta = layer.deltas["default"]
        torch.testing.assert_close(delta.weight.grad, delta.support.gather(whole))


def test_a_causal_hint():
    (adapted, dense), x = _pair(), _inputs()[0]
    mask = nn.Transformer.generate_square_subsequent_mask(QUERIES, dtype=torch.float64)
    for need_weights in (True, False):
        options = {"attn_mask": mask, "is_causal": True, "need_weights": need_weights}
        torch.testing.assert_close(adapted(x, x, x, **options)[0], dense(x, x, x, **options)[0])
    with pytest.raises(RuntimeError, match="attn_mask"):
        adapted(x, x, x, is_causal=True)


def _malformed():
    whole = torch.ones(QUERIES, KEYS)
    padding = torch.ones(BATCH, KEYS)
    masks = {
        "integer mask": {"attn_mask": whole.long()},
        "integer padding": {"key_padding_mask": padding.long()},
        "byte padding": {"key_padding_mask": padding.byte()},
        "transposed mask": {"attn_mask": whole.t().bool()},
        "one row": {"attn_mask": whole[:1].bool()},
        "one dimension": {"attn_mask": whole[0].bool()},
        "a mask per sample": {"attn_mask": whole.expand(BATCH, -1, -1).bool()},
        "four dimensions": {"attn_mask": whole.expand(BATCH, HEADS, -1, -1).bool()},
        "padding of queries": {"key_padding_mask": padding[:, :QUERIES].bool()},
        "padding of one sample": {"key_padding_mask": padding[:1].bool()},
        "padding without a batch": {"key_padding_mask": padding[0].bool()},
        "padding per head": {"key_padding_mask": padding.repeat(HEADS, 1).bool()},
    }
    query, key, value = _inputs()
    inputs = {
        "fewer values": (query, key, value[:, 1:]),
        "fewer samples": (query, key[1:], value[1:]),
        "narrow keys": (query, key[..., 1:], value[..., 1:]),
        "narrow queries": (query[..., 1:], key, value),
        "one sample's queries": (query[0], key, value),
        "a dimension more": (query[None], key[None], value[None]),
    }
    cases = {name: (_inputs(), mask) for name, mask in masks.items()}
    return cases | {name: (x, {}) for name, x in inputs.items()}


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("case", _malformed())
def test_what_torch_refuses_is_refused_with_what_it_should_be(case, need_weights):
    attention, (_, adapted) = _attention(), _adapted(_attention())
    x, masks = _malformed()[case]
    with pytest.raises((AssertionError, RuntimeError)):
        attention(*x, **masks, need_weights=need_weights)
    with pytest.raises(ValueError, match="must"):
        adapted(*x, **masks, need_weights=need_weights)


@pytest.mark.parametrize(
    "masks",
    [
        {},
        {"attn_mask": (QUERIES, KEYS)},
        {"attn_mask": (HEADS, QUERIES, KEYS)},
        {"key_padding_mask": (KEYS,)},
    ],
    ids=str,
)
@EVERY_FORM
def test_a_sample_without_a_batch(form, masks):
    adapted, dense = _pair(form)
    generator = torch.Generator().manual_seed(3)
    options = {name: torch.rand(shape, generator=generator) > 0.7 for name, shape in masks.items()}
    batch_first = OPTIONS[form].get("batch_first", True)
    single = [x[0] if batch_first else x[:, 0] for x in _inputs(form)]
    for mine, theirs in zip(adapted(*single, **options), dense(*single, **options), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_dropout_acts_in_training_only():
    attention = nn.MultiheadAttention(WIDTH, HEADS, dropout=0.5, batch_first=True)
    model, adapted = _adapted(attention)
    x = torch.randn(BATCH, QUERIES, WIDTH)
    assert not torch.equal(adapted(x, x, x)[0], adapted(x, x, x)[0])
    model.eval()
    assert torch.equal(adapted(x, x, x)[0], adapted(x, x, x)[0])


@EVERY_FORM
def test_without_active_adapters_it_is_the_attention_bit_for_bit(form):
    model, adapted = _adapted(_attention(form))
    expected = _attention(form).requires_grad_(False)(*_inputs(form))
    with model.disable_adapter():
        for mine, theirs in zip(adapted(*_inputs(form)), expected, strict=True):
            assert torch.equal(mine, theirs)
    assert not torch.equal(adapted(*_inputs(form))[0], expected[0])


def test_hooks_on_the_attention_are_refused_not_skipped():
    _, adapted = _adapted(_attention())
    adapted.base_layer.register_forward_hook(lambda module, args, output: output)
    with pytest.raises(NotImplementedError, match="hooks"):
        adapted(*_inputs())


# ------------------------------------------------------------------ in torch's encoder


def _encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2).eval()


ENCODER_TARGETS = pytest.mark.parametrize("targets", ["all-neurons", ["linear1"], ["self_attn"]], ids=str)


@ENCODER_TARGETS
@pytest.mark.parametrize("padded", [False, True])
def test_the_fused_encoder_of_inference_does_not_leave_adapters_out(targets, padded):
    encoder = _encoder()
    model = get_peft_model(encoder, NeuroAdaConfig(k=2, target_modules=targets, init_weights=False)).eval()
    x = torch.randn(BATCH, QUERIES, WIDTH)
    mask = torch.zeros(BATCH, QUERIES, dtype=torch.bool)
    mask[0, 3:] = padded
    y = model(x, src_key_padding_mask=mask)
    with torch.no_grad():
        in_inference = model(x, src_key_padding_mask=mask)
        without = _encoder()(x, src_key_padding_mask=mask)
    torch.testing.assert_close(in_inference[~mask], y[~mask])
    assert not torch.allclose(without[1:], y[1:])
    encoder = model.unload()
    assert encoder.use_nested_tensor
    with torch.no_grad():
        torch.testing.assert_close(encoder(x, src_key_padding_mask=mask)[~mask], without[~mask])


@ENCODER_TARGETS
def test_a_mixed_batch_in_an_encoder(targets):
    model = get_peft_model(_encoder(), NeuroAdaConfig(k=2, target_modules=targets, init_weights=False)).eval()
    model.add_adapter("other", NeuroAdaConfig(k=1, target_modules=targets, init_weights=False))
    x = torch.randn(BATCH, QUERIES, WIDTH)
    alone = {"__base__": _encoder()(x)}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = model(x)
    names = ["other", "__base__", "default"]
    mixed = model(x, adapter_names=names)
    for sample, name in enumerate(names):
        torch.testing.assert_close(mixed[sample], alone[name][sample])


def test_layers_have_the_classes_of_their_method():
    _, adapted = _adapted(_attention())
    assert type(adapted) is NeuroAdaMultiheadAttention
    assert all(type(layer) is NeuroAdaLinear for layer in adapted.parts.values())


def test_a_part_alone_is_refused():
    model = nn.ModuleDict({"attention": _attention()})
    with pytest.raises(ValueError, match="Target 'attention'"):
        get_peft_model(model, NeuroAdaConfig(target_modules=["out_proj"]))
