"""Decoders outside the listed families: read as they are, or refused with the part that does not fit."""

import pytest
import torch
import transformers as hf

from peft_ext.knockout import AttentionKnockout, FlowSample, ModuleKnockout, answer_probability_by_layer
from peft_ext.knockout.model.architecture import scaled_logits
from tests._models.vision_language import LAYERS, WIDTH, grouped

from ._runs import generated, knockout, logits
from ._sweeps import assert_same


_SIZES = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.1}
_LLAMA = {
    **_SIZES,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}


def build(kind, **options):
    torch.manual_seed(0)
    return getattr(hf, f"{kind}ForCausalLM")(getattr(hf, f"{kind}Config")(**options)).eval()


SCALED = {
    "Cohere": {**_LLAMA, "logit_scale": 0.25},
    "Granite": {**_LLAMA, "logits_scaling": 3.0},
}


@pytest.mark.parametrize("kind", SCALED)
def test_scaled_logits_are_read_as_the_model_scales_them(kind):
    model = build(kind, **SCALED[kind])
    batch, groups = grouped("llama")
    expected = logits(model, batch)[groups["last"]].softmax(-1)[:, 7]
    last = [r["probability"] for r in answer_probability_by_layer(model, batch, {"a": 7}) if r["layer"] == LAYERS]
    torch.testing.assert_close(torch.tensor(last), expected)
    assert_same(model, FlowSample(batch, groups), layers=[1])


def test_logits_that_nothing_scales_are_not_copied():
    scores = torch.randn(2, 3)
    assert scaled_logits(scores, hf.LlamaConfig(**_LLAMA)) is scores


@pytest.mark.parametrize("kind", ["GPTNeoX", "OPT"])
def test_families_whose_cache_or_norm_has_another_name(kind):
    model = build(kind, **_LLAMA, ffn_dim=48, word_embed_proj_dim=WIDTH)
    batch, groups = grouped("llama", texts=((3, 7),))
    assert_same(model, FlowSample(batch, groups), layers=[1])
    found = []
    for cache in (True, False):
        with AttentionKnockout(model, range(LAYERS), [(groups["question"], groups["last"])]):
            found.append(generated(model, batch, use_cache=cache)[0])
    torch.testing.assert_close(*found, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (
            "Bloom",
            {"hidden_size": WIDTH, "n_layer": 2, "n_head": 4},
            "BloomAttention.* adds the residual stream",
        ),
        ("Mpt", {"d_model": WIDTH, "n_layers": 2, "n_heads": 4}, "MptAttention.* whose mask is of its own kind"),
    ],
)
def test_what_a_knockout_would_get_wrong_is_refused(kind, options, message):
    """Bloom's modules add the residual stream, so that zeros would take that away too; MPT's masks are inverted."""
    model = build(kind, vocab_size=64, **options)
    _, groups = grouped("llama")
    with pytest.raises(ValueError, match=message):
        AttentionKnockout(model, [0], [(groups["image"], groups["question"])])
    for module in ("attention", "mlp"):
        with pytest.raises(ValueError, match=message if module == "attention" else "self-attention|residual|no child"):
            ModuleKnockout(model, [0], groups["question"], module)


def _wrapped(model):
    return torch.compile(model, backend="eager")


def _in_place(model):
    model.compile(backend="eager")
    return model


def _its_layers(model):
    for layer in model.model.layers:
        layer.compile(backend="eager")
    return model


def _its_forward(model):
    model.forward = torch.compile(model.forward, backend="eager")
    return model


@pytest.mark.parametrize("compiled", [_wrapped, _in_place, _its_layers, _its_forward])
def test_compiled_models_are_refused(compiled):
    """Compiled code passes over hooks that came later: the knockout would change nothing, without a word."""
    _, groups = grouped("llama")
    with pytest.raises(ValueError, match="model is compiled"):
        AttentionKnockout(compiled(build("Llama", **_LLAMA)), [1], [(groups["image"], groups["question"])])


@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_a_context_that_reaches_no_layer_warns(kind):
    model = build("Llama", **_LLAMA)
    batch, groups = grouped("llama")
    own = knockout(model, groups, kind)
    with pytest.warns(UserWarning, match="ended without a call to its layers"), own:
        pass
    with own:
        logits(model, batch)
