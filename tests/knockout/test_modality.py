"""LMAR, compared with ratios computed from whole attention maps."""

import csv

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_ext import MoReSConfig
from peft_ext.knockout.read.modality import lmar
from peft_ext.knockout.read.modality_plots import plot_modality
from tests._models.vision_language import IMAGE, VIDEO, VISION, build, inputs
from tests.sparse._probes import LargestAllocation
from tests.tuners.mores._common import adapted


CAUSAL = [family for family in VISION if family != "paligemma"]
TEXTS = ((3, 4), (6, 3))


def maps(model, batch):
    """Every layer's whole attention map `[layers, batch, heads, tokens, tokens]`, fp64."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    base.set_attn_implementation("eager")
    extra = {}
    if not hasattr(base.model, "rope_deltas"):
        extra["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        attentions = model(**batch, **extra, output_attentions=True).attentions
    return torch.stack([layer.double() for layer in attentions])


def expected(attention, batch, reduction="mean", heads="mean", system="exclude", average="ratios", row=-1):
    """Eq. 2 with loops over samples, layers and heads."""
    ids, real = batch["input_ids"], batch["attention_mask"].bool()
    layers, samples, number = attention.shape[:3]
    image_values, text_values = [torch.zeros(samples, layers, number, dtype=torch.float64) for _ in range(2)]
    for sample in range(samples):
        visual = [i for i, token in enumerate(ids[sample].tolist()) if token in (IMAGE, VIDEO)]
        text = [i for i in range(ids.shape[1]) if real[sample, i] and i not in visual]
        if system == "exclude":
            text = [i for i in text if i > visual[0]]
        for layer in range(layers):
            for head in range(number):
                weights = attention[layer, sample, head, row]
                image_sum, text_sum = (sum(weights[i].item() for i in tokens) for tokens in (visual, text))
                scale = (len(visual), len(text)) if reduction == "mean" else (1, 1)
                image_values[sample, layer, head] = image_sum / scale[0]
                text_values[sample, layer, head] = text_sum / scale[1]
    if average == "means":
        image_values, text_values = image_values.mean(0, keepdim=True), text_values.mean(0, keepdim=True)
    if heads == "ratio":
        return (image_values / text_values).mean(2).mean(0)
    return (image_values.mean(2) / text_values.mean(2)).mean(0)


@pytest.mark.parametrize("family", CAUSAL)
def test_equals_the_whole_maps(family):
    batch = inputs(family, texts=TEXTS, padding="left")
    result = lmar(build(family), [batch])
    torch.testing.assert_close(result.ratio, expected(maps(build(family), batch), batch), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("engine", ["step", "full"])
@pytest.mark.parametrize(
    "choices",
    [
        {"reduction": "sum"},
        {"heads": "ratio"},
        {"system": "text"},
        {"average": "means"},
        {"average": "means", "heads": "ratio", "reduction": "sum", "system": "text"},
    ],
    ids=str,
)
def test_every_choice_equals_the_whole_maps(choices, engine):
    batch = inputs(texts=TEXTS, padding="left")
    result = lmar(build(), [batch], engine=engine, **choices)
    torch.testing.assert_close(result.ratio, expected(maps(build(), batch), batch, **choices), atol=1e-5, rtol=1e-4)


def test_paligemma_needs_the_whole_prompt():
    batch = inputs("paligemma", texts=TEXTS, padding="left")
    with pytest.raises(ValueError, match="engine='full'"):
        lmar(build("paligemma"), [batch])
    result = lmar(build("paligemma"), [batch], engine="full")
    torch.testing.assert_close(result.ratio, expected(maps(build("paligemma"), batch), batch), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
@pytest.mark.parametrize("count_generated", [False, True])
def test_generated_tokens(family, count_generated):
    model, batch = build(family), inputs(family, texts=((3, 4), (3, 4)))
    result = lmar(model, [batch], queries="generated", max_new_tokens=3, count_generated=count_generated)
    whole = dict(batch)
    for _ in range(2):
        with torch.no_grad():
            new = model(**whole).logits[:, -1:].argmax(-1)
        whole["input_ids"] = torch.cat([whole["input_ids"], new], dim=1)
        whole["attention_mask"] = torch.ones_like(whole["input_ids"])
        if "mm_token_type_ids" in whole:
            whole["mm_token_type_ids"] = torch.nn.functional.pad(whole["mm_token_type_ids"], (0, 1))
    attention = maps(build(family), whole)  # [layers, batch, heads, tokens, tokens]
    prompt = batch["input_ids"].shape[1]
    visual = whole["input_ids"] == IMAGE
    text = ~visual & (visual.cumsum(1) > 0)
    images, texts = [], []
    for row in range(prompt - 1, prompt + 2):
        counted = text.clone()
        counted[:, row + 1 if count_generated else prompt :] = False
        values = attention[:, :, :, row]
        images.append((values * visual[:, None]).sum(-1) / visual.sum(1)[:, None])
        texts.append((values * counted[:, None]).sum(-1) / counted.sum(1)[:, None])
    image, text_ = torch.stack(images).mean(0).mean(-1), torch.stack(texts).mean(0).mean(-1)  # [layers, batch]
    torch.testing.assert_close(result.per_sample, (image / text_).T, atol=1e-5, rtol=1e-4)


def test_several_batches_are_one_sample_set():
    first, second = inputs(texts=((3, 4),)), inputs(texts=((6, 3),))
    both = lmar(build(), [first, second])
    alone = torch.cat([lmar(build(), [batch]).per_sample for batch in (first, second)])
    torch.testing.assert_close(both.per_sample, alone)
    torch.testing.assert_close(both.ratio, alone.mean(0))


def test_share_of_the_image_is_its_part_of_one():
    batch = inputs(texts=TEXTS, padding="left")
    attention = maps(build(), batch)
    visual = batch["input_ids"] == IMAGE
    share = (attention[:, :, :, -1] * visual[None, :, None]).sum(-1).mean(-1).T
    torch.testing.assert_close(lmar(build(), [batch]).image_share, share, atol=1e-6, rtol=1e-4)


def test_with_an_adapter_it_is_that_models_attention():
    batch = inputs(texts=TEXTS, padding="left")
    model = adapted()
    result = lmar(model, [batch])
    assert not torch.allclose(result.ratio[1:], lmar(build(), [batch]).ratio[1:], rtol=1e-2)
    torch.testing.assert_close(result.ratio, expected(maps(model, batch), batch), atol=1e-5, rtol=1e-4)


def test_the_model_is_left_as_it_was():
    model, calls = build(), []

    def fail(*args):
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("broken")

    before = model.config.text_config._attn_implementation
    lmar(model, [inputs(texts=((3, 4),))])
    assert model.config.text_config._attn_implementation == before != "eager"
    with pytest.raises(RuntimeError, match="broken"), model.get_decoder().register_forward_pre_hook(fail):
        lmar(model, [inputs(texts=((3, 4),))])
    assert model.config.text_config._attn_implementation == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "max"}, "reduction='max' .*choose one of"),
        ({"heads": 3}, "heads=3 .*choose one of"),
        ({"queries": "all"}, "queries='all' .*choose one of"),
        ({"system": "image"}, "system='image' .*choose one of"),
        ({"engine": "fast"}, "engine='fast' .*choose one of"),
        ({"queries": "generated", "max_new_tokens": 0}, "max_new_tokens=0"),
        ({"queries": "generated", "max_new_tokens": -1}, "max_new_tokens=-1"),
        ({"queries": "generated", "max_new_tokens": 1.5}, "max_new_tokens=1.5"),
        ({"model": build().train()}, "training mode"),
        ({"batches": [inputs(texts=TEXTS)]}, "padding_side='left'"),
        ({"batches": [inputs(texts=(None,))]}, "no visual tokens"),
        ({"batches": []}, "batches is empty"),
        ({"batches": inputs()}, r"\[batch\]"),
        ({"batches": [{"pixel_values": inputs()["pixel_values"]}]}, "pixel_values, but no input_ids"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        lmar(**{"model": build(), "batches": [inputs()], **options})


def test_steered_text_needs_the_whole_prompt():
    """Its last tokens are others without the prompt's last one."""
    batch = inputs(texts=TEXTS, padding="left")
    model = adapted(token_positions="l2", layers_to_transform="all")
    with pytest.raises(ValueError, match="token_positions='l2'.*engine='full'"):
        lmar(model, [batch])
    lmar(model, [batch], engine="full")
    with model.disable_adapter():
        torch.testing.assert_close(lmar(model, [batch]).ratio, lmar(build(), [batch]).ratio)


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_a_prompt_that_ends_in_an_image_needs_to_be_whole(family):
    batch = inputs(family, texts=((3, 0),))
    batch |= {key: batch[key][:, :-1] for key in ("input_ids", "attention_mask", "token_type_ids") if key in batch}
    assert batch["input_ids"][0, -1] == IMAGE
    with pytest.raises(ValueError, match="ends in a visual token"):
        lmar(build(family), [batch], system="text")
    result = lmar(build(family), [batch], system="text", engine="full")
    attention = maps(build(family), batch)
    torch.testing.assert_close(result.ratio, expected(attention, batch, system="text"), atol=1e-5, rtol=1e-4)


def test_no_map_of_tokens_by_tokens_is_made():
    batch = inputs(texts=((1, 500),))
    model = build()
    model.config.text_config.max_position_embeddings = 1024
    tokens = batch["input_ids"].shape[1]
    with LargestAllocation() as step:
        lmar(model, [batch], queries="generated", max_new_tokens=2)
    with LargestAllocation() as full:
        lmar(model, [batch], engine="full")
    assert step.elements < tokens**2 < full.elements


def test_figure_and_its_numbers(tmp_path):
    batch = inputs(texts=TEXTS, padding="left")
    steered = get_peft_model(build(), MoReSConfig()).eval()
    results = {"base": lmar(build(), [batch]), "MoReS": lmar(steered, [batch])}
    path = tmp_path / "lmar.png"
    plot_modality(results, path, {"base": 0, "MoReS": 130})
    assert path.read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((tmp_path / "lmar.csv").open()))
    assert len(rows) == 2 * len(results["base"].ratio)
    assert [float(row["lmar"]) for row in rows if row["method"] == "base"] == results["base"].ratio.tolist()
    with pytest.raises(ValueError, match="results is empty"):
        plot_modality({}, path)
    with pytest.raises(ValueError, match="lacks 'MoReS'"):
        plot_modality(results, path, {"base": 0})
