"""The LLaVA example end to end at the smallest size, its data layouts, and the parts it composes."""

import json

import datasets
import llava_steering
import pytest
import torch
from _steering import composing, data, running
from _steering.methods import Method, trained_parameters
from PIL import Image
from transformers import LlavaForConditionalGeneration

from tests.examples.conftest import EXAMPLES


SHAPES = str(EXAMPLES / "shapes_llava")
TINY = ["--samples", "16", "--test-samples", "8", "--steps", "2", "--align-steps", "2", "--batch-size", "4"]


@pytest.mark.parametrize("library", ["trainer", "trl"])
@pytest.mark.parametrize("method", ["mores-1@1", "lora-2"])
def test_two_stages_and_what_they_leave(method, library, tmp_path):
    report = llava_steering.main(["--method", method, "--library", library, "--out", str(tmp_path), *TINY])
    assert report["alignment_loss"] > 0 and report["loss"] > 0
    for name in ("before", "after"):
        assert 0 <= report[name]["exact_match"] <= 1 and len(report[name]["lmar"]) == 6
    assert json.loads((tmp_path / "report.json").read_text())["method"] == method
    assert (tmp_path / "lmar.png").exists() and (tmp_path / "adapted" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    "name, number",
    [("lora-4", None), ("ia3", None), ("oft-8", None), ("neuroada-1", None), ("mores-2@25", 5 * (4 * 64 + 2))],
)
def test_every_method_adapts_the_text_model_alone(name, number):
    model = Method.parse(name).adapt(LlavaForConditionalGeneration.from_pretrained(SHAPES))
    names = [key for key, p in model.named_parameters() if p.requires_grad]
    assert names and all("language_model" in key for key in names)
    assert number is None or trained_parameters(model) == number


def test_full_training_leaves_the_vision_tower():
    model = Method.parse("full").adapt(LlavaForConditionalGeneration.from_pretrained(SHAPES))
    frozen = {key for key, p in model.named_parameters() if not p.requires_grad}
    assert frozen and all("vision_tower" in key for key in frozen)


WRONG = {
    "adapter": (["--method", "adapter"], "mores-<rank>"),
    "rank": (["--method", "mores-0@1"], "mores-<rank>"),
    "percent": (["--method", "mores-1@101"], "mores-<rank>"),
    "size of full": (["--method", "full-3"], "mores-<rank>"),
    "tokens of lora": (["--method", "lora-8@5"], "mores-<rank>"),
    "library": (["--library", "lightning"], "invalid choice"),
    "one part": (["--text-model", "x"], "go together"),
    "model and parts": (["--model", "x", "--text-model", "y", "--vision-tower", "z"], "whole model"),
    "batch": (["--batch-size", "0"], "--batch-size must be at least 1"),
    "test samples": (["--test-samples", "-1"], "--test-samples must be at least 1"),
    "alignment": (["--align-steps", "-1"], "--align-steps must not be negative"),
    "file": (["--data", "absent.json"], "there is no file absent.json"),
}


@pytest.mark.parametrize("options, message", WRONG.values(), ids=WRONG.keys())
def test_wrong_options_are_refused_before_anything_is_loaded(options, message, capsys):
    with pytest.raises(SystemExit):
        llava_steering.main(options)
    assert message in capsys.readouterr().err


def test_a_composed_model_has_the_weights_of_its_parts(tmp_path):
    whole = composing.load(SHAPES)
    text = whole.model.get_decoder()
    from transformers import LlamaForCausalLM

    causal = LlamaForCausalLM(text.config)
    causal.model.load_state_dict(text.state_dict())
    causal.lm_head.load_state_dict(whole.model.lm_head.state_dict())
    causal.save_pretrained(tmp_path / "text")
    whole.processor.tokenizer.save_pretrained(tmp_path / "text")
    whole.model.model.vision_tower.save_pretrained(tmp_path / "tower")
    whole.processor.image_processor.save_pretrained(tmp_path / "tower")
    composed = composing.compose(str(tmp_path / "text"), str(tmp_path / "tower"), layer=-1)
    composed.model.model.multi_modal_projector.load_state_dict(whole.model.model.multi_modal_projector.state_dict())
    samples = data.shapes(4, 0)
    for part in (whole, composed):
        part.inputs = running.prompts(part.processor, samples)
    assert torch.equal(whole.inputs["input_ids"], composed.inputs["input_ids"])
    with torch.no_grad():
        expected, actual = (part.model.eval()(**part.inputs).logits for part in (whole, composed))
    torch.testing.assert_close(actual, expected)


def test_labels_are_the_answer_and_the_end():
    processor = composing.load(SHAPES).processor
    samples = data.shapes(5, 0)
    batch = data.Collator(processor)(samples)
    for ids, labels, sample in zip(batch["input_ids"], batch["labels"], samples, strict=True):
        kept = labels[labels != -100]
        assert processor.tokenizer.decode(kept) == f"{sample.answer} </s>"
        assert torch.equal(ids[labels != -100], kept)


def test_llava_layout(tmp_path):
    entries = [
        {"conversations": [{"value": "only text"}, {"value": "skipped"}]},
        {"image": "a.png", "conversations": [{"value": "<image>\nWhat is it?"}, {"value": "A dog"}]},
    ]
    (tmp_path / "mix.json").write_text(json.dumps(entries))
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (sample,) = data.llava_file(tmp_path / "mix.json", tmp_path)
    assert (sample.text, sample.answer) == ("USER: <image>\nWhat is it? ASSISTANT:", "A dog")
    assert sample.picture().size == (4, 4)


def test_another_layout_is_refused(tmp_path):
    (tmp_path / "other.json").write_text(json.dumps({"1": {"question": "Which?"}}))
    with pytest.raises(ValueError, match="not in LLaVA's layout"):
        data.llava_file(tmp_path / "other.json", tmp_path)


def test_a_file_in_llavas_layout_end_to_end(tmp_path):
    """Its last samples are those that are asked."""
    entries = []
    for number, sample in enumerate(data.shapes(6, 0)):
        sample.image.save(tmp_path / f"{number}.png")
        question = sample.text.replace("<image>", "").replace("USER :", "").replace("ASSISTANT :", "").strip()
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": sample.answer}]
        entries.append({"image": f"{number}.png", "conversations": turns})
    (tmp_path / "mix.json").write_text(json.dumps(entries))
    options = ["--data", str(tmp_path / "mix.json"), "--images", str(tmp_path), "--out", str(tmp_path / "out"), *TINY]
    with pytest.raises(SystemExit, match="6 samples.*--test-samples"):
        llava_steering.main(options)
    report = llava_steering.main([*options, "--test-samples", "2", "--samples", "4"])
    assert report["loss"] > 0 and len(report["after"]["lmar"]) == 6


def test_a_data_set_from_a_folder(tmp_path):
    """As `load_dataset` gives it: images, lists of answers, samples without an image."""
    images = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    rows = {"image": [images[0], None, images[1]], "question": ["a?", "b?", "c?"], "answers": [["x", "y", "y"]] * 3}
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "question": datasets.Value("string"),
            "answers": datasets.List(datasets.Value("string")),
        }
    )
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "test.parquet")
    samples = data.hub_dataset(str(tmp_path), "test")
    assert [(sample.text, sample.answer) for sample in samples] == [
        (data.llava_prompt("a?"), "y"),
        (data.llava_prompt("c?"), "y"),
    ]
    assert samples[1].picture().getpixel((0, 0)) == (0, 0, 255)


ROWS = {
    "ScienceQA": ({"image": 1, "question": "Which?", "choices": ["x", "y"], "answer": 1}, "B"),
    "VizWiz": (
        {"image": 1, "question": "What?", "answers": [{"answer": "can"}, {"answer": "a"}, {"answer": "can"}]},
        "can",
    ),
    "IconQA": ({"query_image": 1, "question": "How many?", "answer": "4"}, "4"),
    "no image": ({"image": None, "question": "Which?", "answer": "x"}, None),
    "no answer": ({"image": 1, "question": "Which?", "answers": []}, None),
}


@pytest.mark.parametrize("row, answer", ROWS.values(), ids=ROWS.keys())
def test_layouts_of_data_sets(row, answer):
    sample = data.from_row(row)
    assert (sample and sample.answer) == answer


@pytest.mark.parametrize("said, right", [(" Red.", True), ("red", True), ("blue", False), ("red one", False)])
def test_exact_match_ignores_case_and_stops(said, right):
    assert (data.normalise(said) == data.normalise("Red")) == right
