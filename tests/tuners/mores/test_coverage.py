"""Calls with a cache outside generate(): the tokens of one pass are steered, or the call is refused untouched."""

import contextlib

import pytest
import torch
from peft import get_peft_model
from transformers import DynamicCache

from peft_ext import MoReSConfig, unfinished_prompt, visual_tokens
from tests._models.vision_language import IMAGE, build, inputs
from tests.contract._common import fill, logits
from tests.tuners.mores._cases import CLOSE, adapted, batch_of, caches, text_model


def part(batch, start, end):
    """Tokens of a call, with a mask for those before too."""
    return {"input_ids": batch["input_ids"][:, start:end], "attention_mask": batch["attention_mask"][:, :end]}


def in_parts(model, batch, *ends, cache=None, contexts=()):
    """Logits of calls that go on where the one before ended, each inside a context."""
    cache = DynamicCache(config=model.config.get_text_config()) if cache is None else cache
    found, start = [], 0
    for number, end in enumerate(ends):
        with contexts[number] if number < len(contexts) else contextlib.nullcontext():
            found.append(logits(model, part(batch, start, end), past_key_values=cache))
        start = end
    return torch.cat(found, dim=1)


@contextlib.contextmanager
def refused(model, cache, error, match):
    """The call inside is refused before any layer runs, and leaves the cache as it was."""
    calls, before = [], cache.get_seq_length()
    handle = model.get_base_model().get_input_embeddings().register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(error, match=match), torch.no_grad():
        yield
    handle.remove()
    assert not calls and cache.get_seq_length() == before


# ---------------------------------------------------------------------- text


@pytest.mark.parametrize("padding", [False, True], ids=["full", "left"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_prompt_in_parts(kind, padding):
    model, batch = adapted("loreft"), batch_of("loreft", padding)
    more = [unfinished_prompt(model) for _ in range(2)]
    actual = in_parts(model, batch, 4, 17, batch["input_ids"].shape[1], cache=caches(model)[kind], contexts=more)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(actual[real], logits(model, batch)[real], **CLOSE)


def test_tokens_that_follow_a_prompt_one_by_one_or_with_labels():
    model, batch = adapted("loreft"), batch_of("loreft", padding=False)
    labels = batch["input_ids"].clone()
    labels[:, :20] = -100
    wanted = logits(model, batch, labels=labels)  # the prompt ends before the labels
    torch.testing.assert_close(in_parts(model, batch, 20, *range(21, 29)), wanted, **CLOSE)
    with torch.no_grad():
        cache = model(**part(batch, 0, 20)).past_key_values
    answer = logits(model, part(batch, 20, 28), past_key_values=cache, labels=labels[:, 20:])
    torch.testing.assert_close(answer, wanted[:, 20:], **CLOSE)


def test_more_of_a_prompt_that_had_ended_is_refused():
    model, batch = adapted("loreft"), batch_of("loreft", padding=False)
    cache = DynamicCache(config=model.config)
    logits(model, part(batch, 0, 20), past_key_values=cache)
    with refused(model, cache, ValueError, "8 tokens follow a prompt in the cache.*unfinished_prompt"):
        model(**part(batch, 20, 28), past_key_values=cache)
    with refused(model, cache, ValueError, r"Other ones of the 20 tokens.*'f5\+l3'.*unfinished_prompt"):
        model.generate(**batch, past_key_values=cache, max_new_tokens=2)
    cache.crop(-3)  # its last tokens, which were steered as the prompt's
    torch.testing.assert_close(
        logits(model, part(batch, 17, 28), past_key_values=cache), logits(model, batch)[:, 17:], **CLOSE
    )


def test_a_prompt_that_ends_too_soon_after_its_cached_part_is_refused():
    model, batch = adapted("loreft"), batch_of("loreft", padding=False)
    cache = DynamicCache(config=model.config)
    with unfinished_prompt(model):
        logits(model, part(batch, 0, 26), past_key_values=cache)
    with refused(model, cache, ValueError, "without the prompt's last tokens"):
        model(**part(batch, 26, 28), past_key_values=cache)


def test_generate_needs_a_whole_prompt():
    model, batch = adapted("loreft"), batch_of("loreft")
    with pytest.raises(ValueError, match="generate.. needs a whole prompt"), unfinished_prompt(model):
        model.generate(**batch, max_new_tokens=1)


def test_a_cache_that_was_filled_without_the_adapter_is_refused():
    model, batch = adapted("loreft"), batch_of("loreft", padding=False)
    cache = DynamicCache(config=model.config)
    with model.disable_adapter():
        logits(model, part(batch, 0, 10), past_key_values=cache)
    for call in (
        lambda: model(**part(batch, 10, 28), past_key_values=cache),
        lambda: model.generate(**batch, past_key_values=cache, max_new_tokens=2),
    ):
        with refused(model, cache, ValueError, "the adapter was off when the cache was filled"):
            call()
    foreign = DynamicCache(config=model.config)
    logits(text_model(), part(batch, 0, 10), past_key_values=foreign)
    with refused(model, foreign, ValueError, "not all of them came from calls of the adapted model"):
        model(**part(batch, 10, 28), past_key_values=foreign)


def test_last_tokens_after_a_cache_that_was_filled_without_the_adapter():
    """Nothing in the cache was to be steered."""
    model, batch = adapted("loreft"), batch_of("loreft", padding=False)
    last = fill(get_peft_model(text_model(), MoReSConfig(rank=2, token_positions="l3")).eval())
    wanted, cache = logits(last, batch), DynamicCache(config=model.config)
    with last.disable_adapter():
        logits(last, part(batch, 0, 10), past_key_values=cache)
    actual = logits(last, part(batch, 10, 28), past_key_values=cache)
    torch.testing.assert_close(actual, wanted[:, 10:], **CLOSE)


def test_embeddings_of_a_vision_language_model_are_refused_where_text_is_told_from_images():
    model, batch = adapted("loreft on llava"), batch_of("llava")
    embeddings = model.get_input_embeddings()(batch["input_ids"]).detach()
    with pytest.raises(RuntimeError, match="visual_token_mask"):
        model(inputs_embeds=embeddings, attention_mask=batch["attention_mask"])
    mask = batch["input_ids"] == IMAGE
    logits(model, {"inputs_embeds": embeddings, "attention_mask": batch["attention_mask"]}, visual_token_mask=mask)


# ---------------------------------------------------------------------- images


def test_an_image_that_reaches_over_a_call_is_refused():
    model, batch = adapted("llava"), batch_of("llava", padding=False)
    del batch["pixel_values"]
    cache = DynamicCache(config=model.config.get_text_config())
    logits(model, part(batch, 0, 9), past_key_values=cache)
    with refused(model, cache, ValueError, "Other ones of the 9 tokens.*an image goes on after the cache"):
        model(**part(batch, 9, 28), past_key_values=cache)


def test_a_mask_of_the_whole_prompt_serves_its_parts():
    model, batch = adapted("llava"), batch_of("llava", padding=False)
    del batch["pixel_values"]
    mask = batch["input_ids"] == IMAGE
    with visual_tokens(model, mask):
        actual = in_parts(model, batch, 9, 13, 28)
    torch.testing.assert_close(actual, logits(model, batch), **CLOSE)


@pytest.mark.parametrize("start", [3, 22])
def test_a_mask_of_the_tokens_after_a_cache(start):
    """Until now it was taken for one of the cached tokens, and nothing was steered."""
    model, batch = adapted("llava"), batch_of("llava", padding=False)
    del batch["pixel_values"]
    mask = batch["input_ids"] == IMAGE
    mask[:, 23:27] = True
    wanted = logits(model, batch, visual_token_mask=mask)
    for given in (mask, mask[:, start:]):
        for way in ("around", "argument"):
            cache = DynamicCache(config=model.config.get_text_config())
            logits(model, part(batch, 0, start), past_key_values=cache)
            rest = {**part(batch, start, 28), "past_key_values": cache}
            if way == "around":
                with visual_tokens(model, given):
                    actual = logits(model, rest)
            else:
                actual = logits(model, rest, visual_token_mask=given)
            torch.testing.assert_close(actual, wanted[:, start:], **CLOSE)
    with refused(model, cache, ValueError, "visual_token_mask must be"), visual_tokens(model, mask[:, :7]):
        model(**part(batch, 28, 28 + 0), past_key_values=cache)


def test_shares_of_a_sample_over_several_calls_are_refused():
    base = build("llava")
    model = fill(get_peft_model(base, MoReSConfig(rank=2, token_ratio=0.25, token_grouping="sample")).eval())
    first = inputs(texts=((3, 2),))
    cache = DynamicCache(config=model.config.get_text_config())
    logits(model, first, past_key_values=cache)
    with refused(model, cache, ValueError, "token_grouping='sample'"):
        model(**inputs(texts=((2, 4),)), past_key_values=cache)
    foreign = DynamicCache(config=model.config.get_text_config())
    logits(build("llava"), first, past_key_values=foreign)
    second = {name: value for name, value in inputs(texts=((2, 4),)).items() if name != "attention_mask"}
    with refused(model, foreign, ValueError, "does not know whether the first 23 tokens"):
        model(**second, past_key_values=foreign)
    # Text that follows has no part in it.
    logits(model, {"input_ids": torch.tensor([[5, 6]])}, past_key_values=cache)


def test_continuous_batching_is_refused():
    model = adapted("loreft")
    with pytest.raises(RuntimeError, match=r"cache, a object. Use generate\(\)"):
        model(input_ids=torch.tensor([[5, 6]]), cache=object())
