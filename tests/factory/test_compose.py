"""Composed models: their parts' weights, their formats, and what is refused with a reason."""

import pytest
import torch
from _factory.check import check, compose, rows
from _factory.parts import images, text_model, tokenizer, tower
from _shapes.parts import SHAPES
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForImageTextToText,
    BartConfig,
    BartForCausalLM,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    LlavaForConditionalGeneration,
    MambaConfig,
    MambaForCausalLM,
)

from peft_ext.cli import main
from peft_ext.factory import LlavaFactoryForConditionalGeneration, load
from peft_ext.factory import compose as by_name
from peft_ext.factory.compose import assemble
from peft_ext.factory.data import sample_of
from peft_ext.factory.evaluate import measure_lmar, prompts
from peft_ext.factory.modeling import Head
from peft_ext.factory.parts import adapt
from peft_ext.factory.templates import chat_template
from peft_ext.knockout import answer_probability_by_layer


SAMPLE = [
    ("Llama", "CLIP", "mlp2x_gelu", "llava"),
    ("Qwen2", "SigLIP", "linear", "llava"),
    ("Phi-2", "DINOv2", "pixel_shuffle", "own"),
    ("Gemma 2", "DINOv2 + registers", "qformer", "own"),
    ("GPT-2", "ConvNeXt", "resampler", "own"),
    ("Granite", "ViT", "identity", "own"),
]


@pytest.mark.parametrize("text, vision, connector, kind", SAMPLE)
def test_a_combination_trains_saves_and_loads_bit_for_bit(text, vision, connector, kind, tmp_path):
    assert check(text, vision, connector, tmp_path) == kind


def test_the_command_composes_parts_with_their_weights(composed_shapes):
    whole = AutoModelForImageTextToText.from_pretrained(SHAPES)
    composed = load(str(composed_shapes / "composed"))
    assert type(composed.model) is LlavaForConditionalGeneration
    mine = composed.model.state_dict()
    for key, tensor in whole.state_dict().items():
        assert ("multi_modal_projector" in key) != torch.equal(mine[key], tensor), key
    assert composed.processor.chat_template == (composed_shapes / "template.jinja").read_text()
    assert main(["llava", "compose", str(composed_shapes / "composed"), "--text-model=x", "--vision-tower=y"]) == 1


def test_the_vision_part_is_taken_of_a_pair(composed_shapes, tmp_path):
    tower = AutoModelForImageTextToText.from_pretrained(composed_shapes / "composed").model.vision_tower
    text = CLIPTextConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    pair = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=tower.config.to_dict(), projection_dim=64))
    pair.save_pretrained(tmp_path)
    load(str(composed_shapes / "composed")).processor.image_processor.save_pretrained(tmp_path)
    composed = by_name(str(composed_shapes / "text"), str(tmp_path), feature_layer=-1, template="vicuna")
    mine = composed.model.model.vision_tower.state_dict()
    theirs = pair.vision_model.state_dict()
    assert mine and all(torch.equal(mine[key], theirs[key.removeprefix("vision_model.")]) for key in mine)


def test_a_linear_connector_in_transformers_format_is_linear():
    connector = compose("Llama", "CLIP", "linear").model.model.multi_modal_projector
    features = torch.randn(5, 32)
    expected = features @ connector.linear_1.weight.T + connector.linear_1.bias
    torch.testing.assert_close(connector(features), expected)


def test_pixel_shuffle_puts_neighbours_together():
    connector = compose("Llama", "CLIP", "pixel_shuffle").model.model.multi_modal_projector
    seen = []
    connector.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    features = torch.arange(16.0).view(1, 4, 4, 1).expand(-1, -1, -1, 32).flatten(1, 2)
    connector(features)
    assert seen[0][0, :, ::32].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


def test_an_image_token_is_added_as_the_mean_of_all_rows():
    before = text_model("Llama").get_input_embeddings().weight
    composed = compose("Llama", "CLIP", "mlp2x_gelu")
    after, row = composed.model.get_input_embeddings().weight, composed.model.config.image_token_id
    assert row == composed.processor.tokenizer.convert_tokens_to_ids("<image>")
    assert torch.equal(after[: len(before)], before)
    if row >= len(before):
        torch.testing.assert_close(after[row], before.mean(dim=0))


def test_generation_stops_where_the_template_ends_an_answer():
    composed = compose("Llama", "CLIP", "mlp2x_gelu")
    assert composed.model.generation_config.eos_token_id == [2]
    assert composed.model.generation_config.pad_token_id == 0


def test_images_are_padded_to_squares(composed_shapes):
    """A wide red image: rows of the mean colour above and below, which normalises to zero."""
    parts = [str(composed_shapes / name) for name in ("text", "tower")]
    composed = by_name(*parts, feature_layer=-1, template="vicuna", pad=True)
    pixels = composed.processor.image_processor(images=Image.new("RGB", (64, 32), "red"), return_tensors="pt")
    rows = pixels["pixel_values"][0].abs().amax(dim=(0, 2))
    assert (rows[:7] < 0.05).all() and (rows[9:23] > 1).all() and (rows[25:] < 0.05).all()
    assert composed.model.config.image_seq_length == 16


def test_a_template_begins_as_the_tokenizer_does():
    words = tokenizer()
    assert "bos_token" not in chat_template("vicuna", words)
    words._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert "bos_token" in chat_template("vicuna", words)


def test_special_tokens_of_the_language_model_stay():
    tokens = compose("Llama", "CLIP", "linear").processor.tokenizer.all_special_tokens
    assert {"<image>", "<|im_start|>", "<|im_end|>"} <= set(tokens)


def test_lmar_and_steering_of_an_own_format():
    composed = compose("Phi-2", "CLIP", "qformer")
    composed.model = adapt(composed.model, "mores-1@25").eval()
    samples = [sample_of(row) for row in rows()[:1]]
    assert measure_lmar(composed, samples, 1).ratio.shape == (2,)
    with pytest.raises(ValueError, match="a resampler has a norm"):
        adapt(compose("Llama", "CLIP", "resampler").model, "connector-2")


def test_a_lens_scales_the_logits_of_an_own_format_once():
    model, ids = compose("Granite", "CLIP", "qformer").model, torch.arange(3, 11)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits[0, -1].softmax(-1)[7]
    (*_, last) = answer_probability_by_layer(model, {"input_ids": ids}, {"a": 7})
    assert last["probability"] == pytest.approx(float(expected), rel=1e-4)


def parts(**changed):
    made = {"text": text_model("Llama"), "tokenizer": tokenizer(), "tower": tower("CLIP"), "images": images()}
    return made | changed


def test_what_does_not_fit_is_refused_with_the_reason():
    for options, message in (
        ({"connector": "mlp3x"}, "connector='mlp3x' is not known; use one of identity"),
        ({"connector": "linear", "connector_config": {"queries": 3}}, "no option 'queries'; it has none"),
        ({"connector": "qformer", "connector_config": {"querys": 3}}, "'querys'; it has queries and those of Blip2QF"),
        ({"connector": "resampler", "connector_config": {"queries": 0}}, "queries=0 must be a positive whole number"),
        ({"connector": "pixel_shuffle", "connector_config": {"factor": 3}}, "factor=3 divides, but .* 16 tokens"),
        ({"feature_layer": -9}, "hidden states of layer -9"),
        ({"template": "llama9"}, "chat_template='llama9' is no file"),
    ):
        with pytest.raises(ValueError, match=message):
            assemble(**parts(), **options)
    with pytest.raises(ValueError, match="the tower gives 20 tokens"):
        assemble(**parts(tower=tower("DINOv2 + registers")), connector="pixel_shuffle")
    small = BartConfig(vocab_size=32, d_model=16, encoder_layers=1, decoder_layers=1)
    with pytest.raises(ValueError, match=r"BartForCausalLM has a .*decoder-only"):
        assemble(**parts(text=BartForCausalLM(small)))


def test_an_identity_needs_one_width():
    made = parts()
    made["tower"].config.hidden_size = 64
    with pytest.raises(ValueError, match="says size 64"):
        assemble(**made, connector="identity")


def test_a_language_model_that_llava_would_change_is_refused(monkeypatch):
    """Gemma 2's soft cap, if it were forgotten."""
    monkeypatch.setattr(Head, "forward", torch.nn.Linear.forward)
    text = text_model("Gemma 2")
    text.config.final_logit_softcapping = 0.1
    with pytest.raises(ValueError, match="gives other logits than its causal language model"):
        assemble(**parts(text=text))


def test_a_recurrent_model_is_refused():
    text = MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=32, num_hidden_layers=2, state_size=4))
    with pytest.raises(ValueError, match="Llava can't call a MambaModel .*past_key_values"):
        assemble(**parts(text=text))


@pytest.mark.slow
def test_generation_with_every_own_connector():
    for connector in ("identity", "pixel_shuffle", "resampler", "qformer"):
        composed = compose("Llama", "CLIP", connector)
        assert isinstance(composed.model, LlavaFactoryForConditionalGeneration)
        batch = prompts(composed.processor, [sample_of(row) for row in rows()])
        together = composed.model.generate(**batch, max_new_tokens=3, do_sample=False)[:, -3:]
        for number, row in enumerate(rows()):
            alone = prompts(composed.processor, [sample_of(row)])
            answer = composed.model.generate(**alone, max_new_tokens=3, do_sample=False)[0, -3:]
            assert torch.equal(answer, together[number])
