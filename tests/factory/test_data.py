"""Layouts of conversations: LLaVA's files, chat messages, questions; and what is wrong with a bad file."""

import io
import json

import datasets
import pytest
from PIL import Image

from peft_ext.factory.data import load_source, read_llava, sample_of


ASKED = {"from": "human", "value": "<image>\nWhat is it?"}
ANSWERED = {"from": "gpt", "value": "A dog"}


def entry(*turns, **more):
    return {"conversations": list(turns), **more}


def test_llavas_layout(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    plain = {"from": "human", "value": "Hello"}
    several = {"from": "human", "value": "Is <image> like <image>?"}
    entries = [
        entry(plain, ANSWERED),
        entry(ASKED, ANSWERED, plain, ANSWERED, image="a.png"),
        entry(several, ANSWERED, image=["a.png", "a.png"]),
        entry({"from": "human", "value": "What?"}, ANSWERED, image="a.png"),
    ]
    (tmp_path / "mix.json").write_text(json.dumps(entries))
    data = load_source(str(tmp_path / "mix.json"), image_tokens=100)
    text, one, two, unnamed = (sample_of(row) for row in data)
    assert text.images == [] and text.messages[0] == {"role": "user", "content": "Hello"}
    picture, words = {"type": "image"}, {"type": "text", "text": "What is it?"}
    assert one.messages[0] == {"role": "user", "content": [picture, words]}
    assert [message["role"] for message in one.messages] == ["user", "assistant"] * 2
    kinds = [part.get("text", "image") for part in two.messages[0]["content"]]
    assert kinds == ["Is", "image", "like", "image", "?"] and len(two.pictures()) == 2
    assert unnamed.messages[0]["content"][0] == picture
    lengths = data["length"]
    assert lengths[0] < 100 < lengths[1] < 200 < lengths[2]
    assert len(load_source(str(tmp_path / "mix.json"), limit=2)) == 2


@pytest.mark.parametrize(
    "content, message",
    [
        ({"1": {"question": "Which?"}}, "not in LLaVA's layout, a list"),
        ([], "not in LLaVA's layout, a list"),
        ([entry(ASKED, ANSWERED, image="a.png"), {"image": "a.png"}], "entry 1 is not in LLaVA's layout"),
        ([entry(ASKED, ANSWERED)], "entry 0: it has 0 images, but 1 <image>"),
        ([entry(ASKED, ANSWERED, image="b.png")], r"entry 0: there is no image .*b.png; pass .*`images`"),
        ([entry(ASKED, image="a.png")], "entry 0: a conversation needs a human's turn and ends with an answer"),
        ([entry({"from": "bot", "value": "x"}, ANSWERED)], "a turn is from 'bot'"),
        ([entry({"value": "x"})], "not a list of turns"),
        ("[", "is no JSON"),
    ],
)
def test_bad_files_are_refused_with_the_entry(content, message, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    file = tmp_path / "mix.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read_llava(file, tmp_path)


def test_images_are_read_as_data_sets_hold_them():
    file = io.BytesIO()
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(file, "PNG")
    sample = sample_of({"image": {"bytes": file.getvalue(), "path": None}, "question": "Red?", "answer": "no"})
    assert sample.pictures()[0].getpixel((0, 0)) == (255, 255, 255)  # transparent parts are white


def test_messages_of_a_data_set(tmp_path):
    """As datasets gives them: parts with all keys, those of others empty."""
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "Red"}]
    row = {"messages": messages, "images": ["a.png"]}
    assert sample_of(row).messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": "What?"}]


def test_questions_of_a_data_set_from_a_folder(tmp_path):
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
    samples = [sample_of(row) for row in load_source(str(tmp_path), split="test")]
    assert [sample.messages[-1]["content"] for sample in samples] == ["y"] * 3
    assert [len(sample.images) for sample in samples] == [1, 0, 1]
    assert samples[2].pictures()[0].getpixel((0, 0)) == (0, 0, 255)
    streamed = [sample_of(row) for row in load_source(str(tmp_path), split="test", streaming=True, limit=2)]
    assert [sample.messages for sample in streamed] == [sample.messages for sample in samples[:2]]


ROWS = {
    "ScienceQA": ({"image": 1, "question": "Which?", "choices": ["x", "y"], "answer": 1}, "B"),
    "VizWiz": (
        {"image": 1, "question": "What?", "answers": [{"answer": "can"}, {"answer": "a"}, {"answer": "can"}]},
        "can",
    ),
    "IconQA": ({"query_image": 1, "question": "How many?", "answer": "4"}, "4"),
}


@pytest.mark.parametrize("row, answer", ROWS.values(), ids=ROWS.keys())
def test_layouts_of_questions(row, answer):
    sample = sample_of(row)
    assert sample.messages[-1] == {"role": "assistant", "content": answer} and sample.images == [1]


def test_rows_of_other_layouts_are_refused(tmp_path):
    datasets.Dataset.from_dict({"text": ["x"]}).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="columns text; needed are `conversations`"):
        load_source(str(tmp_path))
    with pytest.raises(ValueError, match="columns text; needed are `conversations`"):
        sample_of({"text": "x"})
    with pytest.raises(ValueError, match="has no answer: 'Which"):
        sample_of({"question": "Which?", "answers": []})
