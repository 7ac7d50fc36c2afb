"""The page holds what the records say, whatever text and pictures they come with."""

import base64
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from peft_ext.knockout import (
    FlowSample,
    SampleView,
    find_token_groups,
    layer_sweep,
    patch_effects,
    report,
    sample_view,
)
from peft_ext.knockout.prompts.patches import box_coverage, patch_places
from peft_ext.knockout.read.modality import lmar
from tests._models.vision_language import VISION, build, grouped, prepared

from . import _processors
from ._pages import NASTY, PAIRS, records


def data(page, name="data"):
    found = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', page, re.S)
    return json.loads(found[1])


def ranges(given):
    return [at for first, last in given for at in range(first, last + 1)]


def halves(text):
    return np.frombuffer(base64.b64decode(text), "<f2").astype(np.float32)


def test_curves_are_means_and_intervals_of_the_records(tmp_path):
    made = records([f"s{at}" for at in range(30)])
    page = report(made, path=tmp_path / "new" / "page.html")
    assert page.path.read_text(encoding="utf-8") == page.html
    (run,) = data(page.html)["runs"]
    assert run["settings"] == {"window": "1"}
    for curve in run["curves"]:
        for at, layer in enumerate(curve["layers"]):
            own = [r["change_percent"] for r in made if (r["pair"], r["layer"]) == (curve["pair"], layer)]
            assert curve["mean"][at] == pytest.approx(np.mean(own), rel=1e-5)
            error = 1.96 * np.std(own) / 30**0.5
            assert curve["low"][at] == pytest.approx(np.mean(own) - error, abs=0.4 * error)
    sample = data(page.html, "sample-7")
    assert sample["name"] == "s7"
    assert sample["runs"][0]["curves"][1]["mean"] == pytest.approx(
        [r["change_percent"] for r in made if (r["sample"], r["pair"]) == ("s7", PAIRS[1])], rel=1e-5
    )


@pytest.fixture(scope="module")
def measured():
    """A tiny LLaVA, a sample with padding's place taken by nothing, and its view."""
    processor = _processors.llava()
    model = _processors.local_model(processor)
    picture = Image.effect_noise((40, 32), 90).convert("RGB")
    question = "What color is the café's table, 赤 or red?"
    text = "USER: <image>" + question + " ASSISTANT:"
    batch = dict(processor(images=[picture], text=[text], return_tensors="pt"))
    groups = find_token_groups(processor, batch, spans={"question": question})
    sample = FlowSample(batch, groups, names=["one"])
    view = sample_view(model, processor, sample, picture, question, targets=("question", "last"), window=1)
    return model, processor, sample, view


def test_a_view_is_what_the_measurements_say(measured):
    model, processor, sample, view = measured
    ids = sample.inputs["input_ids"][0]
    assert "".join(piece.text for piece in view.pieces if piece.text) == processor.tokenizer.decode(
        ids[~sample.groups["image"][0]], clean_up_tokenization_spaces=False
    )
    positions = [at for piece in view.pieces for at in piece.positions]
    assert sorted(positions) == list(range(len(ids)))
    assert view.patches == sample.groups["image"][0].nonzero().flatten().tolist()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(**sample.inputs, output_attentions=True)
    model.set_attn_implementation("sdpa")
    expected = torch.stack([layer[0, :, -1].mean(0) for layer in output.attentions]).numpy()
    np.testing.assert_allclose(view.attention, expected, atol=1e-6)
    assert view.lmar == pytest.approx(lmar(model, [sample.inputs]).ratio.tolist(), abs=1e-6)
    final = output.logits[0, -1].softmax(-1)
    assert view.lens.probability[-1] == pytest.approx(float(final.max()), abs=1e-5)
    assert view.lens.words[-1][0][0] == view.lens.answer == processor.tokenizer.decode([int(final.argmax())])
    kinds = [(effects.kind, effects.target) for effects in view.effects]
    assert kinds == [("patch", "question"), ("word", "question"), ("patch", "last"), ("word", "last")]
    for effects in view.effects[:1]:
        found = patch_effects(model, sample, effects.target, window=1)
        np.testing.assert_allclose(effects.change[:, 0], [r["change_percent"] for r in found], atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*block.* nothing:UserWarning")  # patches outside a sliding window
@pytest.mark.parametrize("family", VISION)
def test_views_of_every_family(family):
    """Attention and answer are what the whole model computes in eager mode."""
    model, batch, groups = prepared(family, texts=((3, 7),))
    view = sample_view(model, _processors.tokenizer(), FlowSample(batch, groups, names=["one"]), words=False)
    with torch.no_grad():
        output = build(family, "eager")(**batch, output_attentions=True)
    length = batch["input_ids"].shape[1]
    for layer, weights in enumerate(output.attentions):
        expected = weights[0, :, -1].mean(0)
        expected = torch.nn.functional.pad(expected, (length - len(expected), 0)).numpy()
        np.testing.assert_allclose(view.attention[layer], expected, atol=1e-5)
    assert view.lens.probability[-1] == pytest.approx(float(output.logits[0, -1].softmax(-1).max()), abs=1e-5)
    assert len(view.lmar) == len(output.attentions) and view.patches == groups["image"][0].nonzero().flatten().tolist()
    assert [(e.kind, e.layers, e.change.shape) for e in view.effects] == [("patch", [], (len(view.patches), 1))]


def test_answers_of_several_tokens():
    """The last one is read after the others, in the lens, the attention and the effects."""
    batch, groups = grouped(texts=((3, 7),))
    model = build()
    sample = FlowSample(batch, groups, answer_ids=[[5, 9, 7]], names=["one"])
    view = sample_view(model, _processors.tokenizer(), sample, answer_token="last", words=False)
    longer = {"input_ids": torch.cat([batch["input_ids"], torch.tensor([[5, 9]])], 1)}
    with torch.no_grad():
        final = model(**{**batch, **longer, "attention_mask": None}).logits[0, -1].softmax(-1)
    assert view.lens.probability[-1] == pytest.approx(float(final[7]), rel=1e-3)
    assert view.attention.shape[1] == longer["input_ids"].shape[1]
    (record, *_) = patch_effects(model, sample, answer_token="last")
    assert record["base_probability"] == pytest.approx(float(final[7]), rel=1e-3) and record["answer_id"] == 7
    assert view.effects[0].change[0, 0] == pytest.approx(record["change_percent"], abs=1e-3)


def test_blocks_of_pictures_that_are_no_squares():
    """Qwen2-VL's grid has the picture's shape, which the places of its patches tell."""
    processor = _processors.Qwen()
    model = _processors.local_model(processor)
    picture = Image.effect_noise((80, 48), 90).convert("RGB")
    batch = processor([picture], ["<image> What color is the table?"])
    view = sample_view(model, processor, FlowSample(batch, find_token_groups(processor, batch)), picture, block=3)
    assert len(view.patches) == 6 * 10 and sorted(map(len, view.effects[0].units)) == [3, 3] + [9] * 6


def test_the_page_holds_the_view(measured):
    model, _, sample, view = measured
    made = layer_sweep(model, sample, ["image:question", "image:last"], window=1, progress=False)
    own = data(report(made, [view]).html, "sample-0")
    run = own["runs"][0]
    assert own["question"] == view.question and own["image"]["src"].startswith("data:image/png;base64,")
    assert ranges(run["patches"]) == view.patches and len(run["places"]) == 64
    np.testing.assert_allclose(
        halves(run["attention"]["values"]).reshape(view.attention.shape), view.attention, rtol=1e-3
    )
    for effects, shown in zip(view.effects, run["effects"], strict=True):
        assert [ranges(unit) for unit in shown["units"]] == effects.units and shown["target"] == effects.target
        np.testing.assert_allclose(
            halves(shown["change"]).reshape(effects.change.T.shape), effects.change.T, rtol=1e-3, atol=1e-4
        )
    assert run["base"] == pytest.approx(made[0]["base_probability"], rel=1e-5)


@pytest.mark.parametrize(
    ("processor", "size", "tokens", "options"),
    [
        (_processors.llava, (80, 64), 64, {}),
        (_processors.llava_padding, (80, 64), 64, {"do_pad": True}),
        (_processors.llava_next, (100, 60), 234, {}),
        (_processors.gemma3, (80, 64), 16, {}),
        (_processors.Qwen, (80, 64), 80, {}),
    ],
)
def test_places_of_patches_are_where_the_processor_looks(processor, size, tokens, options):
    """A patch turns bright if its place in the picture is painted, and hardly if all else is."""
    processor = processor()
    width, height = size
    places = patch_places(processor, size, tokens, options)
    seen = box_coverage(processor, size, [(0, 0, width, height)], tokens, options).share
    known = [at for at in range(len(places)) if not places[at].isnan().any() and seen[at] > 0.5]
    assert len(known) >= 16
    for at in known[:: max(1, len(known) // 9)]:
        left, top, right, bottom = (places[at] * torch.tensor([width, height, width, height])).tolist()
        box = (max(0, round(left)), max(0, round(top)), min(width, round(right)), min(height, round(bottom)))
        shares = box_coverage(processor, size, [box], len(places), options).share
        assert shares[at] > 0.6 * seen[at] and shares[at] > 0.9 * shares.max()


FAULTS = {
    "missing": lambda folder: folder / "nowhere.png",
    "corrupt": lambda folder: (folder / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n123") and folder / "cut.png",
    "numbers of unknown range": lambda folder: Image.new("F", (9, 5)),
    "text": lambda folder: {"bytes": b"not an image", "path": "x.jpg"},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_picture_that_cannot_be_read_is_named(measured, tmp_path, fault):
    model, processor, sample, _ = measured
    view = sample_view(model, processor, sample, FAULTS[fault](tmp_path), targets=())
    assert view.image is None and view.problem and view.places == [] and view.attention is not None
    own = data(report(records(["one"]), [view]).html, "sample-0")
    assert own["image"] is None and own["problems"] == [view.problem]
    bare = SampleView("one", image=FAULTS[fault](tmp_path))
    assert data(report(records(["one"]), [bare]).html, "sample-0")["problems"]


def test_huge_pictures_are_shrunk():
    view = SampleView("one", image=Image.effect_noise((6000, 3000), 50))
    own = data(report(records(["one"]), [view]).html, "sample-0")
    assert (own["image"]["width"], own["image"]["height"]) == (448, 224) and len(own["image"]["src"]) < 150_000


def test_infinite_changes_and_lone_surrogates_are_valid_json():
    made = records(["one"])
    made[0]["change_percent"] = float("inf")
    view = SampleView("one", question="\ud800", attention=np.full((3, 2), np.nan), lmar=[float("nan")] * 3)
    page = report(made, [view]).html
    page.encode("utf-8")
    assert data(page, "sample-0")["runs"][0]["curves"][0]["mean"][0] is None


def test_a_text_model_has_a_page_without_pictures():
    batch, groups = grouped("llama", texts=((3, 7),))
    del groups["image"]  # some of the text
    model, tokenizer = build("llama"), _processors.tokenizer()
    view = sample_view(model, tokenizer, FlowSample(batch, groups, names=["one"]), targets=("last",))
    assert view.patches == view.lmar == [] and [e.kind for e in view.effects] == ["word"]
    report(records(["one"]), [view])


@pytest.mark.parametrize(
    ("made", "samples", "options", "message"),
    [
        ([], (), {}, "records is empty"),
        ({}, (), {}, "records is empty"),
        ([{"sample": "a"}], (), {}, "record 0 lacks pair, layer, change_percent"),
        ("sweep.jsonl", (), {}, "records is a str: give the list"),
        (records(["a"]), [{"name": "a"}], {}, "make a view of it"),
        (records(["a"]), [SampleView("b")], {}, "the name 'b', which no record has"),
        (records(["a"]), [SampleView("a"), SampleView("a")], {}, "as an earlier one"),
        ({"x": records(["a"]), "y": records(["a"])}, [SampleView("a")], {}, "give a list by each name"),
        ({"x": records(["a"])}, {"z": []}, {}, "samples holds 'z'"),
        (records(["a"]), (), {"path": "page.pdf"}, "must end in .html"),
    ],
)
def test_malformed(made, samples, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        report(made, samples, **options)
    assert not list(tmp_path.iterdir())


def test_notebooks_show_the_page_inside_a_frame():
    shown = report(records(["a"]), title=NASTY)._repr_html_()
    assert shown.startswith("<iframe ") and shown.count("<") == 2 and 'sandbox="allow-scripts"' in shown


def test_the_demo_is_up_to_date():
    """Otherwise: make flow-demo."""
    demo = (Path(__file__).parents[2] / "docs/flow-demo.html").read_text(encoding="utf-8")
    new = report(records(["a"]), title="Where a tiny LLaVA looks").html
    assert re.sub(r'<script type="application/json".*?</script>\n', "", demo) == re.sub(
        r'<script type="application/json".*?</script>\n', "", new
    )
