"""Windows, packing, batches and later tokens of the answer: the same numbers from each engine."""

import pytest
import torch

from peft_ext.knockout import FlowSample
from peft_ext.knockout.sweep import replay
from tests._models.vision_language import build, grouped, prepared, row

from ._sweeps import PAIRS, assert_same, sweep


@pytest.mark.parametrize("window", [1, 3, 9])
@pytest.mark.parametrize("mode", ["centred", "forward"])
def test_windows(mode, window):
    assert_same(build("llava"), FlowSample(*grouped("llava")), mode=mode, window=window, pairs=PAIRS[:2])


@pytest.mark.parametrize("tokens", [1, 7, 40, 10_000])
def test_any_packing(monkeypatch, tokens):
    monkeypatch.setattr(replay, "PACKED_TOKENS", tokens)
    assert_same(build("llava"), FlowSample(*grouped("llava")))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3", "mistral"])
def test_batches_equal_single_rows(family):
    model, batch, groups = prepared(family, padding="right")
    together, _ = sweep(model, FlowSample(batch, groups), "packed", pairs=["image:question", "question:last"])
    alone = []
    for number in range(2):
        single, own = row(batch, groups, number, family)
        alone.append(sweep(model, FlowSample(single, own), "packed", pairs=["image:question", "question:last"])[0])
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-4)


@pytest.mark.parametrize("token", ["first", "last", 1])
@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3", "llama", "gpt2"])
def test_later_tokens_of_the_answer(family, token):
    sample = FlowSample(*grouped(family), answer_ids=[[5, 9, 12], [7, 8, 11]])
    assert_same(build(family), sample, answer_token=token, layers=[1])


def test_the_answers_last_token_is_what_a_cached_pass_gives():
    """The probability that the full engine reports, from the model's own logits on prompt and answer."""
    model, batch, groups = prepared("llava", texts=((3, 7),))
    answer = [5, 9, 12]
    records = sweep(model, FlowSample(batch, groups, answer_ids=[answer]), "full", answer_token="last")[1]
    ids = torch.cat([batch["input_ids"], torch.tensor([answer[:-1]])], 1)
    with torch.no_grad():
        clean = model(**{**batch, "input_ids": ids, "attention_mask": torch.ones_like(ids)}).logits[0, -1].softmax(-1)
    assert all(record["base_probability"] == pytest.approx(float(clean[12]), rel=1e-5) for record in records)
    assert {record["answer_id"] for record in records} == {12}


def test_windows_that_begin_alike_share_layers():
    """Layers run by the suffix engine, the clean pass included: of [0, 2) and [0, 3) the first two run once."""
    model, calls = build("llava"), [0, 0, 0]
    for index, layer in enumerate(model.get_decoder().layers):
        layer.register_forward_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
    sweep(model, FlowSample(*grouped("llava")), "suffix", pairs=["question:last"], window=3)
    assert calls == [1 + 1, 1 + 2, 1 + 3]
