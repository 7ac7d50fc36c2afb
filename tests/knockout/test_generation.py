"""AttentionKnockout while generating: caches, beams, and the last position that generated tokens take over."""

import warnings

import pytest
import torch
from transformers import DynamicCache, StaticCache

from peft_ext.knockout import AttentionKnockout
from tests._models.vision_language import LAYERS, build, grouped, prepared

from ._runs import generated, logits


PAIRS = [("image", "question"), ("question", "last"), ("image", "last"), ("last", "last")]
_PAIR_IDS = [":".join(pair) for pair in PAIRS]


@pytest.mark.parametrize("pair", PAIRS, ids=_PAIR_IDS)
@pytest.mark.parametrize("family", ["llava", "llava_mistral", "gemma3", "qwen2_vl", "llama", "mistral", "gpt2"])
def test_cached_generation_equals_uncached(family, pair):
    model, batch, groups = prepared(family, texts=((3, 7),))
    found = []
    for cache in (True, False):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a sliding window may leave no edge to block
            with AttentionKnockout(model, range(LAYERS), [(groups[pair[0]], groups[pair[1]])]):
                found.append(generated(model, batch, use_cache=cache)[0])
    torch.testing.assert_close(*found, rtol=0, atol=2e-4)


def test_a_static_cache_equals_a_dynamic_one():
    model, batch, groups = prepared("llava")
    found = []
    for cache in (DynamicCache(), StaticCache(config=model.config.get_text_config(), max_cache_len=48)):
        with AttentionKnockout(model, [0, 1], [(groups["question"], groups["last"])]):
            found.append(generated(model, batch, past_key_values=cache)[0])
    torch.testing.assert_close(*found, rtol=0, atol=2e-4)


def test_generated_tokens_take_over_the_last_position():
    """Blocking question → last while generating equals blocking it in one pass over the whole answer."""
    model, batch, groups = prepared("llama", dtype=torch.float64, texts=((3, 7),))
    pair = (groups["question"], groups["last"])
    with AttentionKnockout(model, [0, 1], [pair]):
        scores, tokens = generated(model, batch)
    whole = {"input_ids": tokens[:, :-1], "attention_mask": torch.ones_like(tokens[:, :-1])}
    length = batch["input_ids"].shape[1]
    source = torch.nn.functional.pad(pair[0], (0, 3))
    target = torch.arange(length + 3)[None] >= length - 1
    with AttentionKnockout(model, [0, 1], [(source, target)]):
        expected = logits(model, whole)[0, length - 1 :]
    torch.testing.assert_close(scores[:, 0].double(), expected, rtol=0, atol=1e-5)
    with AttentionKnockout(model, [0, 1], [pair], answer_tokens=3):
        torch.testing.assert_close(logits(model, whole)[0, length - 1 :], expected)
    with AttentionKnockout(model, [0, 1], [pair], generated="fixed", answer_tokens=3):
        assert not torch.allclose(logits(model, whole)[0, -1], expected[-1])


def test_beams_repeat_the_rows():
    """Beam search of a batch finds what it finds for each row alone."""
    model, batch, groups = prepared("llava", texts=((3, 7), (5, 9)))
    with AttentionKnockout(model, [0, 1], [(groups["image"], groups["question"])]):
        together = generated(model, batch, num_beams=3)[1][:, -4:]
    without = generated(model, batch, num_beams=3)[1][:, -4:]
    for number in range(2):
        own = {name: mask[number : number + 1] for name, mask in groups.items()}
        single = {name: value[number : number + 1] for name, value in batch.items()}
        with AttentionKnockout(model, [0, 1], [(own["image"], own["question"])]):
            assert torch.equal(generated(model, single, num_beams=3)[1][0, -4:], together[number])
    assert not torch.equal(together, without)


def test_rows_are_repeated_in_order():
    model, batch, groups = prepared("llava", texts=((3, 7), (5, 9)))
    repeated = {name: value.repeat_interleave(3, 0) for name, value in batch.items()}
    with AttentionKnockout(model, [0, 1], [(groups["image"], groups["question"])]):
        torch.testing.assert_close(logits(model, repeated), logits(model, batch).repeat_interleave(3, 0))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("assistant", ["a model", "prompt lookup", "own first layers"])
def test_assisted_generation_equals_one_token_at_a_time(assistant):
    """Candidates come with the prompt and several at once; the model's own first layers take back its last token."""
    model = build("llama")
    options = {
        "a model": {"assistant_model": build("llama")},
        "prompt lookup": {"prompt_lookup_num_tokens": 3},
        "own first layers": {"assistant_early_exit": 2},
    }[assistant]
    batch, groups = grouped("llama", texts=((3, 7),))
    batch["input_ids"][:, -4:] = batch["input_ids"][:, -8:-4]  # to be looked up
    pair = (groups["question"], groups["last"])
    with AttentionKnockout(model, range(LAYERS), [pair]):
        expected, _ = generated(model, batch)
    with AttentionKnockout(model, range(LAYERS), [pair], answer_tokens=20):
        torch.testing.assert_close(generated(model, batch, **options)[0], expected, rtol=0, atol=2e-4)
    with (
        pytest.raises(ValueError, match="called with .* assisted generation, set answer_tokens"),
        AttentionKnockout(model, range(LAYERS), [pair]),
    ):
        generated(model, batch, **options)


def test_a_prompt_in_chunks_is_refused_with_the_remedy():
    model, batch, groups = prepared("llama", texts=((3, 7),))
    with (
        pytest.raises(ValueError, match="called with 4.*without prefill_chunk_size"),
        AttentionKnockout(model, [0], [(groups["question"], groups["last"])]),
    ):
        generated(model, batch, prefill_chunk_size=4)


def test_more_tokens_than_a_step_after_a_longer_prefix_are_refused():
    """They were taken for a step after the prompt, which was then sought at the cache's start."""
    model, batch, groups = prepared("llama", texts=((3, 7),))
    ids, cache = batch["input_ids"], DynamicCache(config=model.config)
    logits(model, {"input_ids": ids.repeat(1, 2), "past_key_values": cache})
    with (
        pytest.raises(ValueError, match="prompt of 18 tokens, but the model was called with 17"),
        AttentionKnockout(model, [0], [(groups["question"], groups["last"])]),
    ):
        logits(model, {"input_ids": ids[:, 1:], "past_key_values": cache})
