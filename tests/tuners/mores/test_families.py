"""Every supported family, as a tiny model: the same properties."""

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_ext import MoReSConfig
from tests._models.vision_language import LAYERS, VISION, build, inputs
from tests.contract._common import logits
from tests.tuners.mores._common import adapted, changed, ends, layers_of, steered_base, values_of


families = pytest.mark.parametrize("family", VISION)


@families
def test_first_it_is_the_identity(family):
    base, batch = build(family), inputs(family)
    expected = logits(base, batch)
    model = get_peft_model(base, MoReSConfig(rank=2, token_ratio=0.5, layers_to_transform="all"))
    assert torch.equal(logits(model, batch), expected)
    assert len(layers_of(model)) == LAYERS


@families
@pytest.mark.parametrize("padding", ["right", "left"])
def test_outputs_and_gradients_equal_steering_written_out(family, padding):
    batch = inputs(family, padding=padding)
    chosen = ends(batch["input_ids"], 0.25)
    model, base = adapted(family), build(family)
    parameters = values_of(model, requires_grad=True)
    weights = torch.randn(*batch["input_ids"].shape, 1)
    actual = model(**batch).logits
    with steered_base(base, parameters, chosen):
        expected = base(**batch).logits
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(actual[real], expected[real], atol=2e-4, rtol=1e-3)
    (actual * weights)[real].pow(2).mean().backward()
    (expected * weights)[real].pow(2).mean().backward()
    for name, layer in layers_of(model).items():
        for key, value in layer.mores_steering["default"].named_parameters():
            reference = parameters[name][key].grad
            torch.testing.assert_close(
                value.grad, reference, atol=1e-4 * reference.abs().max().item() + 1e-6, rtol=2e-2
            )


@families
def test_only_chosen_tokens_change_before_the_next_attention(family):
    batch = inputs(family)
    model = adapted(family, layers_to_transform=[0])
    assert torch.equal(changed(model, batch), ends(batch["input_ids"], 0.25))


@families
def test_text_only_samples_keep_every_bit(family):
    batch = inputs(family, texts=(None, None))
    assert torch.equal(logits(adapted(family), batch), logits(build(family), batch))


@families
def test_generation_with_every_kind_of_cache_agrees(family):
    batch = inputs(family, texts=((3, 4), (3, 4)))
    model = adapted(family)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    base = build(family).generate(**batch, **options)
    cached = model.generate(**batch, **options)
    assert not torch.equal(cached.logits[0], base.logits[0])
    torch.testing.assert_close(cached.logits[0], logits(model, batch)[:, -1], atol=1e-4, rtol=1e-3)
    others = {"without": {"use_cache": False}, "static": {"cache_implementation": "static"}}
    for name, kind in others.items():
        other = model.generate(**batch, **options, **kind)
        assert torch.equal(other.sequences, cached.sequences), name
        torch.testing.assert_close(torch.stack(other.logits), torch.stack(cached.logits), atol=1e-4, rtol=1e-3)


@families
def test_saved_and_loaded(family, tmp_path):
    batch, model = inputs(family), adapted(family)
    expected = logits(model, batch)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(build(family), tmp_path), batch), expected)
    base = build(family)
    base.load_adapter(str(tmp_path))
    assert torch.equal(logits(base, batch), expected)


@families
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_gradients_are_those_without_checkpointing(family, reentrant):
    batch = inputs(family)
    gradients = []
    for checkpointing in (False, True):
        model = adapted(family).train()
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(**batch, labels=batch["input_ids"]).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


CONNECTORS = {
    "llava": "model.multi_modal_projector.linear_2",
    "llava_next": "model.multi_modal_projector.linear_2",
    "qwen2_vl": "model.visual.merger.mlp.2",
    "qwen2_5_vl": "model.visual.merger.mlp.2",
    "qwen3_vl": "model.visual.merger.linear_fc2",
    "idefics3": "model.connector.modality_projection.proj",
    "smolvlm": "model.connector.modality_projection.proj",
    "paligemma": "model.multi_modal_projector.linear",
}


@pytest.mark.parametrize("family", list(CONNECTORS))
def test_at_the_connector_it_merges_and_restores_every_bit(family):
    batch = inputs(family)
    bias = build(family).get_submodule(CONNECTORS[family]).bias is not None
    model = adapted(family, site="connector", token_ratio=1.0, steering_bias=bias)
    plain, expected = logits(build(family), batch), logits(model, batch)
    assert list(layers_of(model)) == [CONNECTORS[family]]
    assert not torch.allclose(plain, expected, atol=1e-2)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model.merge_adapter()
    torch.testing.assert_close(logits(model, batch), expected, atol=1e-4, rtol=1e-3)
    model.unmerge_adapter()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, batch), expected, atol=1e-4, rtol=1e-3)
    assert merged.state_dict().keys() == build(family).state_dict().keys()


def test_gemma3_has_no_linear_connector():
    with pytest.raises(ValueError, match=r"multi_modal_projector.*no linear layer"):
        get_peft_model(build("gemma3"), MoReSConfig(site="connector", token_ratio=1.0))


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3"])
def test_a_bf16_base(family):
    batch = inputs(family, dtype=torch.bfloat16)
    model = adapted(family, dtype=torch.bfloat16)
    base = build(family, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    for layer in layers_of(model).values():
        up = layer.mores_steering["default"].up()
        assert (up.T @ up - torch.eye(2)).abs().max() <= 1e-6
    assert logits(model, batch).dtype == logits(base, batch).dtype == torch.bfloat16
    assert not torch.equal(logits(model, batch), logits(base, batch))
    text = inputs(family, texts=(None,))
    assert torch.equal(logits(model, text), logits(base, text))


def test_hidden_states_that_the_model_reports_are_the_steered_ones():
    batch = inputs()
    model = adapted(layers_to_transform=[0])
    with torch.no_grad():
        steered, plain = (m(**batch, output_hidden_states=True).hidden_states for m in (model, build()))
    changed = (steered[1] != plain[1]).any(dim=-1)
    assert torch.equal(steered[0], plain[0])
    assert torch.equal(changed, ends(batch["input_ids"], 0.25))
