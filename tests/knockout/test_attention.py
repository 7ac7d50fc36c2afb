"""AttentionKnockout against a dense reference, in every implementation, family, cache and batch; and its removal."""

import copy
import gc

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model

from peft_ext.knockout import AttentionKnockout, ModuleKnockout
from tests._models.vision_language import CAUSAL, FAMILIES, LAYERS, build, grouped, prepared, row

from ._reference import decoder_embeddings, llama_logits
from ._runs import left_alone, logits


PAIRS = [("image", "question"), ("question", "last"), ("image", "last"), ("last", "last"), ("question", "question")]
_PAIR_IDS = [":".join(pair) for pair in PAIRS]


def edges(groups, pair):
    return groups[pair[0]][:, None] & groups[pair[1]][:, :, None]


@pytest.mark.parametrize("pair", PAIRS, ids=_PAIR_IDS)
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_equals_the_dense_reference(attention, padding, pair):
    model, batch, groups = prepared("llava", attention, padding=padding)
    attended = batch["attention_mask"].bool()
    with torch.no_grad():
        embeddings = decoder_embeddings(model, batch)
        blocked = dict.fromkeys((1, 2), edges(groups, pair))
        expected = llama_logits(model, embeddings, attended, blocked)
        with AttentionKnockout(model, [1, 2], [(groups[pair[0]], groups[pair[1]])]):
            knocked = model(**batch).logits
        clean = model(**batch).logits
        as_it_is = llama_logits(model, embeddings, attended)
    torch.testing.assert_close(clean[attended], as_it_is[attended], rtol=0, atol=2e-6)
    torch.testing.assert_close(knocked[attended], expected[attended], rtol=0, atol=2e-6)
    assert (knocked - clean)[attended].abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_blocked_weights_are_zero_and_rows_sum_to_one(family):
    model, batch, groups = prepared(family, "eager")
    with (
        AttentionKnockout(
            model, [0, 2], [(groups["image"], groups["question"]), (groups["question"], groups["last"])]
        ),
        torch.no_grad(),
    ):
        weights = model(**batch, output_attentions=True).attentions
    closed = (edges(groups, ("image", "question")) | edges(groups, ("question", "last")))[:, None]
    rows = batch["attention_mask"].bool()[:, None].expand(weights[0].shape[:3])
    for layer, weight in enumerate(weights):
        torch.testing.assert_close(weight.sum(-1)[rows], torch.ones(int(rows.sum())))
        inside = weight[closed.expand_as(weight)]
        assert bool((inside == 0).all()) == (layer in (0, 2))


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", [name for name in FAMILIES if FAMILIES[name].sdpa])
def test_eager_equals_sdpa(family, padding):
    batch, groups = grouped(family, padding=padding)
    found = []
    for attention in ("eager", "sdpa"):
        model = build(family, attention)
        with AttentionKnockout(model, range(3), [(groups["image"], groups["question"])]):
            found.append(logits(model, batch)[batch["attention_mask"].bool()].softmax(-1))
    torch.testing.assert_close(*found, rtol=0, atol=1e-6)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_rows_emptied_by_us_add_nothing(attention):
    """All that the first two tokens may attend to is taken away; the reference adds zero there."""
    model, batch, _ = prepared("llama", attention, padding="left")
    attended = batch["attention_mask"].bool()
    first = attended & (attended.cumsum(1) <= 2)
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(batch["input_ids"])
        blocked = first[:, None] & first[:, :, None]
        expected = llama_logits(model, embeddings, attended, {1: blocked})
        with AttentionKnockout(model, [1], [(first, first)]):
            knocked = model(**batch).logits
    torch.testing.assert_close(knocked[attended], expected[attended], rtol=0, atol=2e-6)


@pytest.mark.filterwarnings("ignore:pairs:UserWarning")  # of a window that does not reach the image
@pytest.mark.parametrize("family", FAMILIES)
def test_removal_restores_every_bit(family):
    model, batch, groups = prepared(family)
    with (
        left_alone(model, batch),
        pytest.raises(RuntimeError, match="stop"),
        AttentionKnockout(model, [0, 1], [(groups["image"], groups["last"])]),
    ):
        logits(model, batch)
        raise RuntimeError("stop")
    with left_alone(model, batch), ModuleKnockout(model, [0, 1], groups["question"], "mlp"):
        logits(model, batch)


@pytest.mark.parametrize("family", CAUSAL)
def test_padded_equals_unpadded(family):
    model, batch, groups = prepared(family, dtype=torch.float64, padding="right")
    cast = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    with AttentionKnockout(model, [1, 2], [(groups["image"], groups["question"])]):
        together = logits(model, cast)
    for number in range(2):
        single, own = row(cast, groups, number, family)
        with AttentionKnockout(model, [1, 2], [(own["image"], own["question"])]):
            alone = logits(model, single)[0]
        kept = batch["attention_mask"][number].bool()
        torch.testing.assert_close(together[number, kept], alone, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_sliding_window_stays():
    """In a layer that sees six tokens back, an image farther away has no edge to block."""
    model, batch, groups = prepared("mistral", "eager", texts=((3, 9),))
    with AttentionKnockout(model, range(LAYERS), [(groups["image"], groups["last"])]):
        knocked = logits(model, batch)
    assert torch.equal(knocked, logits(model, batch))


def test_blocking_nothing_warns():
    model, batch, groups = prepared("llama")
    with (
        AttentionKnockout(model, [1], [(groups["question"], groups["image"])]),
        pytest.warns(UserWarning, match="blocks nothing"),
    ):
        logits(model, batch)


def test_several_at_once_equal_their_union():
    model, batch, groups = prepared("llava", dtype=torch.float64)
    batch["pixel_values"] = batch["pixel_values"].double()
    first, second = (groups["image"], groups["question"]), (groups["question"], groups["last"])
    with AttentionKnockout(model, [0, 1], [first]), AttentionKnockout(model, [1, 2], [second]):
        nested = logits(model, batch)
    with (
        AttentionKnockout(model, [0], [first]),
        AttentionKnockout(model, [1], [first, second]),
        AttentionKnockout(model, [2], [second]),
    ):
        torch.testing.assert_close(logits(model, batch), nested)


def test_under_lora():
    """An adapter that has not been trained changes nothing, knocked out or not; a trained one stays in effect."""
    base = build("llava")
    batch, groups = grouped("llava")
    pair = [(groups["image"], groups["question"])]
    with AttentionKnockout(base, [1], pair):
        expected = logits(base, batch)
    model = get_peft_model(build("llava"), LoraConfig(target_modules=["q_proj", "v_proj"])).eval()
    with AttentionKnockout(model, [1], pair):
        assert torch.equal(logits(model, batch), expected)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    merged = copy.deepcopy(model).merge_and_unload()
    with AttentionKnockout(model, [1], pair), AttentionKnockout(merged, [1], pair):
        torch.testing.assert_close(logits(model, batch), logits(merged, batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [PrefixTuningConfig, PromptTuningConfig])
def test_virtual_tokens_shift_the_groups(config):
    """Blocked weights lie at the prompt's tokens, behind the virtual ones."""
    model = get_peft_model(build("llama", "eager"), config(task_type="CAUSAL_LM", num_virtual_tokens=5)).eval()
    batch, groups = grouped("llama", texts=((3, 7),))
    with torch.no_grad(), AttentionKnockout(model, [2], [(groups["image"], groups["question"])]):
        weights = model(**batch, output_attentions=True).attentions
    blocked = edges(groups, ("image", "question"))[:, None]
    length = blocked.shape[-1]
    assert weights[2].shape[-1] == length + 5
    for layer, zero in ((1, False), (2, True)):
        own = weights[layer][:, :, -length:, 5:]
        assert bool((own[blocked.expand_as(own)] == 0).all()) == zero


@pytest.mark.parametrize("family", ["llava", "llama"])
@pytest.mark.parametrize("name", ["flex_attention", "flash_attention_2"])
def test_other_implementations_are_switched_and_put_back(family, name):
    expected_model = build(family, "sdpa")
    batch, groups = grouped(family)
    pair = [(groups["image"], groups["question"])]
    with AttentionKnockout(expected_model, [1], pair):
        expected = logits(expected_model, batch)
    model = build(family, name)
    vision = getattr(model.config, "vision_config", None)
    before = vision and vision._attn_implementation
    with AttentionKnockout(model, [1], pair):
        assert model.get_decoder().config._attn_implementation == "sdpa"
        assert torch.equal(logits(model, batch), expected)
        assert (vision and vision._attn_implementation) == before
    assert model.get_decoder().config._attn_implementation == name


def test_nothing_is_kept_alive():
    model, batch, groups = prepared("llama")
    knockout = AttentionKnockout(model, [1], [(groups["image"], groups["last"])])
    with knockout:
        logits(model, batch)
    count = len(gc.get_referrers(knockout))
    assert count <= 1
    assert not knockout._emptied
