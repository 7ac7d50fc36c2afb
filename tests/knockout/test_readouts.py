"""Lenses and Jaccard similarity: the last layer is the model's own answer, and each number is recomputed by hand."""

import pytest
import torch
from peft import get_peft_model

from peft_ext import MoReSConfig
from peft_ext.knockout import (
    AttentionKnockout,
    ModuleKnockout,
    RidgeLens,
    answer_probability_by_layer,
    answer_tokens,
    residual_stream,
    topk_jaccard,
)
from peft_ext.knockout.sweep.windows import windows
from tests._models.vision_language import FAMILIES, LAYERS, build, grouped, prepared

from . import _processors as make


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_layer_is_the_model_s_answer(family, padding):
    model, batch, groups = prepared(family, padding=padding)
    with torch.no_grad():
        expected = model(**batch).logits[groups["last"]].softmax(-1)
    records = answer_probability_by_layer(model, batch, {"a": 7, "b": [5, 9]})
    for record in records:
        if record["layer"] == LAYERS:
            assert record["probability"] == pytest.approx(
                float(expected[int(record["sample"]), record["token_id"]]), rel=1e-4
            )
    assert len(records) == 2 * 2 * (LAYERS + 1)


@pytest.mark.parametrize("norm", [True, False])
def test_earlier_layers_are_read_as_equation_7_8_says(norm):
    model, batch, groups = prepared("llama")
    with torch.no_grad():
        states = model(**batch, output_hidden_states=True).hidden_states[:-1]  # the last one is normed
        expected = [
            model.lm_head(model.model.norm(state) if norm else state)[groups["last"]].softmax(-1)[:, 7]
            for state in states
        ]
    records = answer_probability_by_layer(model, batch, {"a": 7}, norm=norm)
    for layer, probabilities in enumerate(expected):
        found = [record["probability"] for record in records if record["layer"] == layer]
        torch.testing.assert_close(torch.tensor(found), probabilities, rtol=1e-4, atol=1e-8)


def test_the_ridge_lens_minimises_its_loss(tmp_path):
    """The gradient of the ridge objective is zero at the fitted map, and the last layer's map is the identity."""
    model = build("llama")
    batches = [grouped("llama", texts=((n, 7),) * 12)[0] for n in range(2, 8)]
    ridge = 0.05
    lens = RidgeLens.fit(model, batches, ridge=ridge, progress=False)
    states = torch.cat([residual_stream(model, batch) for batch in batches], 1).double()
    for layer in range(LAYERS):
        weight = lens.weight[layer].double().requires_grad_(True)
        bias = lens.bias[layer].double().requires_grad_(True)
        own = states[layer]
        centred = own - own.mean(0)
        penalty = ridge * centred.pow(2).sum(0).mean()
        loss = (own @ weight.T + bias - states[-1]).pow(2).sum() + penalty * weight.pow(2).sum()
        scale = float(loss.detach())
        for gradient in torch.autograd.grad(loss, (weight, bias)):
            assert gradient.abs().max() < 1e-3 * scale
    assert torch.equal(lens.weight[-1], torch.eye(len(lens.weight[-1])))
    lens.save(tmp_path / "lens.safetensors")
    again = RidgeLens.load(tmp_path / "lens.safetensors")
    assert torch.equal(again.weight, lens.weight) and torch.equal(again.bias, lens.bias)
    batch, _ = grouped("llama")
    last = [answer_probability_by_layer(model, batch, {"a": 7}, lens=own)[-1]["probability"] for own in (lens, None)]
    assert last[0] == pytest.approx(last[1], rel=1e-4)


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
def test_first_tokens_of_answers(kind):
    tokenizer = make.tokenizer(kind)
    for text in ("Red", " Red"):
        like = tokenizer(text, add_special_tokens=False)["input_ids"][0]
        words = answer_tokens(tokenizer, "red", like, other="green", same="Red")
        assert words["capitalized"] == like
        assert tokenizer.decode([words["noncapitalized"]]).strip()[0] == "r"
        assert "same" not in words and "other" in words


@pytest.mark.parametrize("engine", ["full", "suffix", "packed"])
@pytest.mark.parametrize("pooled", ["tokens", "positions"])
def test_jaccard_by_hand(engine, pooled):
    model, batch, groups = prepared("llava")
    pair = (groups["image"], groups["question"])
    records = topk_jaccard(
        model, batch, groups["question"], pairs={"pair": pair}, window=2, k=4, pooled=pooled, engine=engine
    )

    def words(context):
        with torch.no_grad(), context:
            best = model(**batch).logits.topk(4).indices
        found = []
        for row in range(2):
            top = best[row][groups["question"][row]].tolist()
            found.append({(at if pooled == "positions" else 0, w) for at, ws in enumerate(top) for w in ws})
        return found

    clean = words(torch.no_grad())
    assert len(records) == 3 * LAYERS * 2
    for record in records:
        name, row = record["intervention"], int(record["sample"])
        over = windows(LAYERS, 2, "centred" if name == "pair" else "forward")[record["layer"]]
        layers = range(over.start, over.end)
        if name == "pair":
            context = AttentionKnockout(model, layers, [pair])
        else:
            context = ModuleKnockout(model, layers, groups["question"], name)
        after = words(context)[row]
        assert record["jaccard"] == pytest.approx(len(clean[row] & after) / len(clean[row] | after))


def test_jaccard_with_mores_runs_the_whole_model():
    model = get_peft_model(build("llava"), MoReSConfig(init="random")).eval()
    batch, groups = grouped("llava")
    found = topk_jaccard(model, batch, groups["question"], window=2)
    assert found == topk_jaccard(model, batch, groups["question"], window=2, engine="full")
    with pytest.raises(ValueError, match='engine="packed" would not be exact.*MoReS.*Use "full" or "auto"'):
        topk_jaccard(model, batch, groups["question"], window=2, engine="packed")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": {}}, "tokens must be a dict"),
        ({"tokens": {"a": 64}}, r"tokens\['a'\] must be one token per row"),
        ({"tokens": {"a": [1, 2, 3]}}, "one token per row"),
        ({"tokens": {"a": "red"}}, "one token per row"),
        ({"tokens": {"a": 1}, "names": ["x"]}, "names must hold 2 names"),
        ({"tokens": {"a": 1}, "positions": torch.tensor([1, 99])}, "the prompt has 20 tokens: give 0 to 19"),
        ({"tokens": {"a": 1}, "lens": RidgeLens(torch.zeros(3, 5, 5), torch.zeros(3, 5))}, "a model of 2 layers, 5"),
    ],
)
def test_malformed_lens_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        answer_probability_by_layer(build("llama"), grouped("llama")[0], **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k is 0"),
        ({"k": 65}, "k is 65, but the model has 64 words"),
        ({"names": ["x"]}, "names must hold 2 names"),
        ({"pairs": {"mlp": ()}}, "pairs holds 'mlp', which is the name of a module"),
        ({"pooled": "words"}, "pooled is 'words'"),
        ({"modules": ["norm"]}, "modules holds 'norm'"),
        ({"modules": []}, "both empty"),
        ({"engine": "fast"}, "engine is 'fast'"),
    ],
)
def test_malformed_jaccard_arguments(options, message):
    batch, groups = grouped("llama")
    with pytest.raises(ValueError, match=message):
        topk_jaccard(build("llama"), batch, groups["question"], **options)
