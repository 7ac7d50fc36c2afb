"""
Whatever generate() passes to the model at a time, it steers the tokens that one pass over the whole text would. The
reference is the base model without a cache, with the steering written out at tokens named by hand.
"""

import copy
import functools

import pytest
import torch
from peft import get_peft_model, inject_adapter_in_model
from transformers import DynamicCache, MambaConfig, MambaForCausalLM

from peft_ext import MoReSConfig, NeuroAdaConfig, unfinished_prompt
from tests._models.vision_language import IMAGE, VOCABULARY, build, inputs
from tests.contract._common import fill, logits
from tests.tuners.mores._cases import (
    BY_TEXT,
    CASES,
    CLOSE,
    GREEDY,
    adapted,
    batch_of,
    caches,
    ends_of_text,
    text_model,
)
from tests.tuners.mores._common import steered_base, values_of


WAYS = {
    "dynamic": {},
    "none": {"use_cache": False},
    "static": {"cache_implementation": "static"},
    "chunked": {"prefill_chunk_size": 6},
    "static, chunked": {"prefill_chunk_size": 6, "cache_implementation": "static"},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
}


def reference(case, model, batch, **options):
    """generate() of the base model, steered by hooks: a whole pass for each token."""
    chosen = case.chosen(batch).repeat_interleave(options.get("num_beams", 1), 0)
    with steered_base(case.base(), values_of(model), chosen) as base:
        return base.generate(**batch, **GREEDY, use_cache=False, **options)


@functools.cache
def expected(name, padding, beams=False):
    options = WAYS["beams"] if beams else {}
    return reference(CASES[name], adapted(name), batch_of(name, padding), **options)


def assert_same(actual, wanted):
    assert torch.equal(actual.sequences, wanted.sequences)
    torch.testing.assert_close(torch.stack(actual.logits), torch.stack(wanted.logits), **CLOSE)


def combinations():
    """Without the mark, every way with padding for one model of each kind, and for the others what was ever wrong."""
    for name in CASES:
        for way in WAYS:
            for padding in (True, False):
                if name == "gemma3" and "chunked" in way:
                    continue  # its image tokens attend both ways, so that chunks give another model
                telling = padding and (name in ("loreft", "llava") or way in ("static", "chunked"))
                marks = [] if telling else [pytest.mark.slow]
                yield pytest.param(name, way, padding, marks=marks, id=f"{name}-{way}-{'left' if padding else 'full'}")


@pytest.mark.parametrize("name, way, padding", list(combinations()))
def test_every_way_equals_whole_passes(name, way, padding):
    actual = adapted(name).generate(**batch_of(name, padding), **GREEDY, **WAYS[way])
    assert_same(actual, expected(name, padding, way == "beams"))


# ---------------------------------------------------------------------- a cached prefix


def prefix_of(batch, tokens):
    return {name: batch[name][:, :tokens] for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("chunk", [None, 6])
@pytest.mark.parametrize("name", ["loreft", "llava", "loreft on llava"])
def test_a_cached_prefix_is_reused(name, kind, chunk):
    """Three of the five first tokens are in the cache; it serves twice, so that it is copied."""
    model, batch = adapted(name), batch_of(name, padding=False)
    cache = caches(model)[kind]
    with unfinished_prompt(model):
        logits(model, prefix_of(batch, 3), past_key_values=cache)
    for _ in range(2):
        actual = model.generate(**batch, **GREEDY, past_key_values=copy.deepcopy(cache), prefill_chunk_size=chunk)
        assert_same(actual, expected(name, padding=False))


@pytest.mark.parametrize("name", ["loreft", "llava"])
def test_the_rest_of_a_prompt_after_a_cached_prefix(name):
    """Only the new tokens are passed, with a mask for all. A prefix of one row serves several."""
    model, batch = adapted(name), batch_of(name, padding=False)
    batch["input_ids"][1, :4] = batch["input_ids"][0, :4]
    with unfinished_prompt(model), torch.no_grad():
        cache = model(batch["input_ids"][:1, :4], use_cache=True).past_key_values
    cache.batch_repeat_interleave(2)
    rest = {**batch, "input_ids": batch["input_ids"][:, 4:]}
    actual = model.generate(**rest, **GREEDY, past_key_values=cache)
    wanted = reference(CASES[name], model, batch)
    torch.testing.assert_close(torch.stack(actual.logits), torch.stack(wanted.logits), **CLOSE)


def test_padding_between_a_cached_prefix_and_the_rest():
    """A system prompt, then questions of different lengths, padded on their left."""
    model, batch = adapted("loreft"), batch_of("loreft", padding=False)
    batch["attention_mask"][0, 6:11] = 0
    cache = DynamicCache(config=model.config)
    with unfinished_prompt(model):
        logits(model, prefix_of(batch, 6), past_key_values=cache)
    wanted = reference(CASES["loreft"], model, batch)
    assert_same(model.generate(**batch, **GREEDY, past_key_values=cache), wanted)


def test_a_cached_image_is_reused():
    model, batch = adapted("llava"), batch_of("llava", padding=False)
    cache, pixels = DynamicCache(config=model.config.get_text_config()), batch.pop("pixel_values")
    logits(model, {**prefix_of(batch, 22), "pixel_values": pixels}, past_key_values=cache)
    assert_same(model.generate(**batch, **GREEDY, past_key_values=cache), expected("llava", padding=False))


# ---------------------------------------------------------------------- other callers


def repetitive():
    ids = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 9, 5, 6, 7, 8, 5, 6, 7]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


ASSISTANTS = {
    "prompt lookup": lambda: {"prompt_lookup_num_tokens": 3},
    "plain model": lambda: {"assistant_model": text_model()},
    "steered model": lambda: {"assistant_model": CASES["loreft"].model()},
    "own first layers": lambda: {"assistant_early_exit": 2},
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("assistant", ASSISTANTS)
def test_assisted_generation(assistant):
    """Candidates come with the prompt, or several at once after it."""
    model, batch = adapted("loreft"), repetitive()
    lengths, options = [], {**GREEDY, "max_new_tokens": 8, "min_new_tokens": 8}
    handle = model.get_base_model().register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    actual = model.generate(**batch, **options, **ASSISTANTS[assistant]())
    handle.remove()
    assert any(length not in (1, 16) for length in lengths)
    with steered_base(text_model(), values_of(model), ends_of_text(batch)) as base:
        assert_same(actual, base.generate(**batch, **options, use_cache=False))


@pytest.mark.parametrize("way", ["none", "chunked"])
def test_adapters_injected_without_a_peft_model(way):
    model = fill(inject_adapter_in_model(MoReSConfig(rank=2, **BY_TEXT), text_model()))
    assert_same(model.generate(**batch_of("loreft"), **GREEDY, **WAYS[way]), expected("loreft", padding=True))


def test_a_mask_that_generate_finds_itself():
    """Without attention_mask it tells padding by the tokens, and a static cache makes a mask of queries and keys."""
    batch = batch_of("loreft")
    for way in ("dynamic", "static"):
        actual = adapted("loreft").generate(batch["input_ids"], **GREEDY, **WAYS[way])
        assert_same(actual, expected("loreft", padding=True))
    with pytest.raises(ValueError, match="pass attention_mask to generate"):
        adapted("loreft").generate(batch["input_ids"], **GREEDY, prefill_chunk_size=12)


@pytest.mark.parametrize("cached", [0, 3])
@pytest.mark.parametrize("width", ["whole", "rest"])
def test_embeddings_and_a_mask_after_a_cached_prefix(cached, width):
    model, batch = adapted("llava"), batch_of("llava", padding=False)
    with torch.no_grad():  # with the image's features
        seen = []
        decoder = model.get_base_model().get_decoder()
        handle = decoder.register_forward_pre_hook(lambda m, a, k: seen.append(k["inputs_embeds"]), with_kwargs=True)
        model(**batch)
        handle.remove()
        cache = DynamicCache(config=model.config.get_text_config())
        if cached:
            model(**prefix_of(batch, cached), past_key_values=cache)
    mask = batch["input_ids"] == IMAGE
    actual = model.generate(
        inputs_embeds=seen[0],
        attention_mask=batch["attention_mask"],
        visual_token_mask=mask[:, cached:] if width == "rest" else mask,
        past_key_values=cache,
        **GREEDY,
    )
    wanted = expected("llava", padding=False)
    torch.testing.assert_close(torch.stack(actual.logits), torch.stack(wanted.logits), **CLOSE)


def test_a_text_without_a_prompt():
    """generate() alone starts from one token; what it generates is no image, whatever its number."""
    for name in ("loreft", "llava"):
        actual = adapted(name).generate(bos_token_id=5, **GREEDY)
        batch = {"input_ids": torch.tensor([[5]]), "attention_mask": torch.ones(1, 1).long()}
        assert_same(actual, reference(CASES[name], adapted(name), batch))


def test_generated_image_tokens_are_not_steered():
    batch = inputs(texts=(None, None))
    options = {**GREEDY, "prefix_allowed_tokens_fn": lambda row, ids: [IMAGE]}
    actual = adapted("llava").generate(**batch, **options)
    assert (actual.sequences[:, -4:] == IMAGE).all()
    assert_same(actual, build("llava").generate(**batch, **options))


def test_guidance_by_a_second_text():
    """guidance_scale also runs the prompt's last token alone, which holds no image and has no first tokens."""
    model, batch = adapted("llava"), batch_of("llava")
    guided = model.generate(**batch, **GREEDY, guidance_scale=1.5)
    torch.testing.assert_close(guided.logits[0], expected("llava", padding=True).logits[0], **CLOSE)
    with pytest.raises(RuntimeError, match="guidance_scale"):
        adapted("loreft").generate(**batch_of("loreft"), **GREEDY, guidance_scale=1.5)


def test_a_cache_of_states_alone():
    """Mamba's has no tokens to count."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = MambaConfig(vocab_size=VOCABULARY, hidden_size=32, state_size=4, num_hidden_layers=2)
        base = MambaForCausalLM(config).eval()
    model = fill(get_peft_model(base, MoReSConfig(rank=2, **BY_TEXT)).eval())
    batch = repetitive()
    with_cache, without = (model.generate(**batch, **GREEDY, use_cache=use) for use in (True, False))
    assert_same(with_cache, without)
    torch.testing.assert_close(with_cache.logits[0], logits(model, batch)[:, -1], **CLOSE)


@pytest.mark.parametrize("way", ["static, chunked", "beams"])
@pytest.mark.parametrize("kind", ["connector", "neuroada"])
def test_adapters_that_need_no_positions(kind, way):
    """They equal the merged model."""
    config = MoReSConfig(rank=2, site="connector", token_ratio=1.0) if kind == "connector" else NeuroAdaConfig()
    model = get_peft_model(build("llava"), config).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    batch = batch_of("llava")
    actual = model.generate(**batch, **GREEDY, **WAYS[way])
    options = WAYS[way] if way == "beams" else {}
    assert_same(actual, model.merge_and_unload().generate(**batch, **GREEDY, use_cache=False, **options))


def test_generate_is_that_of_the_copy_and_goes_with_the_adapter():
    model = CASES["loreft"].model()
    other, batch = copy.deepcopy(model), batch_of("loreft")
    fill(other, seed=2)
    wanted = expected("loreft", padding=True)
    assert_same(model.generate(**batch, **GREEDY), wanted)
    assert not torch.equal(other.generate(**batch, **GREEDY).logits[0], wanted.logits[0])
    base = model.unload()
    assert "generate" not in vars(base)
    assert_same(base.generate(**batch, **GREEDY), text_model().generate(**batch, **GREEDY))
