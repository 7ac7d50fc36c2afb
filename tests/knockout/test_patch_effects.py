"""Single patches and words, blocked through the packed engine, lose what they lose one by one."""

import pytest
import torch

from peft_ext.knockout import AttentionKnockout, FlowSample, find_token_groups, patch_effects
from tests._models.vision_language import FAMILIES, LAYERS, VISION, build, grouped, prepared

from . import _processors


def naive(model, batch, mask, target, layers, answer):
    """One forward pass of the whole model with one mask blocked: the answer's log-probability."""
    with torch.no_grad(), AttentionKnockout(model, layers, [(mask, target)]):
        logits = model(**batch, use_cache=False).logits
    return float(logits[0, -1].float().log_softmax(-1)[answer])


@pytest.mark.filterwarnings("ignore:.*block.* nothing:UserWarning")  # patches outside a sliding window
@pytest.mark.parametrize("target", ["last", "question"])
@pytest.mark.parametrize("family", VISION)
def test_equals_the_loop_over_patches(family, target):
    model, batch, groups = prepared(family, texts=((3, 6),))
    options = {"groups": groups, "window": 2, "layers": [1]} if target == "question" else {}
    engine = "packed" if FAMILIES[family].causal else "auto"
    records = patch_effects(model, batch, target, engine=engine, **options)
    layers = range(2) if options else range(LAYERS)
    positions = groups["image"][0].nonzero().flatten().tolist()
    assert [record["positions"] for record in records] == [[at] for at in positions]
    assert [record["unit"] for record in records] == list(range(len(positions)))
    assert {record["engine"] for record in records} == {"packed" if FAMILIES[family].causal else "full"}
    assert {record["layer"] for record in records} == ({1} if options else {None})
    expected = []
    for at in positions:
        mask = torch.zeros_like(groups["image"])
        mask[0, at] = True
        expected.append(naive(model, batch, mask, groups[target], layers, records[0]["answer_id"]))
    found = torch.tensor([record["probability"] for record in records]).log()
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-4)
    assert max(abs(record["change_percent"]) for record in records) > 0.03  # beyond the tolerance


def test_blocks_of_a_grid_hide_all_their_patches():
    model, batch, groups = prepared()
    records = patch_effects(model, FlowSample(batch, groups, names=["a", "b"]), block=3, self_check=False)
    sizes = {(record["row"], record["column"]): len(record["positions"]) for record in records}
    assert sizes == {(0, 0): 9, (0, 1): 3, (1, 0): 3, (1, 1): 1}
    for number, name in enumerate("ab"):
        own = [at for record in records if record["sample"] == name for at in record["positions"]]
        assert sorted(own) == groups["image"][number].nonzero().flatten().tolist()


def test_words():
    processor = _processors.llava()
    model = _processors.local_model(processor)
    question = "What color is the café's table, 赤か red?"
    batch = dict(
        processor(images=[torch.zeros(3, 32, 32)], text=["USER: <image>" + question + " A:"], return_tensors="pt")
    )
    groups = find_token_groups(processor, batch, spans={"question": question})
    records = patch_effects(model, FlowSample(batch, groups), sources="words", processor=processor)
    texts = [record["text"] for record in records]
    assert texts == ["What", "color", "is", "the", "café's", "table,", "赤", "か", "red?"]
    assert (
        sorted(at for record in records for at in record["positions"])
        == groups["question"][0].nonzero().flatten().tolist()
    )
    mask = torch.zeros_like(groups["question"])
    mask[0, records[4]["positions"]] = True
    expected = naive(model, batch, mask, groups["last"], range(1), records[0]["answer_id"])
    assert torch.tensor(records[4]["probability"]).log().item() == pytest.approx(expected, abs=1e-4)
    (same,) = patch_effects(model, batch, sources={"it": mask})
    assert same["probability"] == pytest.approx(records[4]["probability"], abs=1e-6) and same["source"] == "it"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "answer"}, r"target is 'answer', which groups do not hold: give one of last"),
        ({"sources": "pixels"}, "sources is 'pixels'"),
        ({"sources": "words"}, "needs the processor"),
        ({"sources": {}}, "sources is empty"),
        (
            {"sources": {"last": torch.ones(1, 26, dtype=torch.bool)}},
            "sources holds 'last', which is the target's name",
        ),
        ({"block": 0}, "block is 0"),
        ({"grid": (3, 5)}, "3 x 5 patches are not the 16 image tokens"),
        ({"layers": [1]}, "give a window"),
        ({"window": 2, "layers": [9]}, "layers holds 9"),
        ({"engine": "fast"}, "engine is 'fast'"),
    ],
)
def test_malformed(options, message):
    with pytest.raises(ValueError, match=message):
        patch_effects(build(), grouped(texts=((3, 7),))[0], **options)


def test_a_prompt_without_an_image_is_refused():
    batch, _ = grouped(texts=((3, 7),))
    batch["input_ids"] = batch["input_ids"].clamp(max=50)
    with pytest.raises(ValueError, match=r"the image holds no token in row\(s\) \[0\]"):
        patch_effects(build(), batch)


@pytest.mark.filterwarnings("error::UserWarning")
def test_patches_outside_the_windows_are_named_once():
    model = build("llava_mistral")  # whose windows of 14 tokens end after the first patches
    with pytest.raises(UserWarning, match=r"patch 0:last, patch 1:last, patch 2:last and \d+ more block nothing"):
        patch_effects(model, FlowSample(*grouped("llava_mistral", texts=((3, 7),))))
