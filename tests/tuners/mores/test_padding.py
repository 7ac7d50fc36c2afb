"""Padding, told from every form of attention mask, and rows that hold several texts."""

import pytest
import torch

from peft_ext.tuners.mores.coverage.padding import packed_starts, real_tokens
from tests._models.vision_language import IMAGE
from tests.contract._common import logits
from tests.tuners.mores._cases import CLOSE, adapted, batch_of


def causal(mask, keys=None):
    """Bool `[batch, 1, tokens, keys]` for a mask `[batch, tokens]`."""
    tokens = mask.shape[1]
    allowed = torch.ones(tokens, tokens).tril().bool() & mask.bool()[:, None, None]
    return torch.nn.functional.pad(allowed, (0, (keys or tokens) - tokens))


FORMS = {
    "bool": lambda mask: causal(mask),
    "added": lambda mask: torch.zeros(()).masked_fill(~causal(mask), torch.finfo(torch.float32).min),
    "by kind of layer": lambda mask: {"full_attention": causal(mask), "sliding_attention": causal(mask)},
}


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("form", ["bool", "added"])
def test_a_mask_of_queries_and_keys_tells_padding(form, padding):
    model, batch = adapted("loreft"), batch_of("loreft")
    if padding == "right":
        batch = {name: value.flip(1) for name, value in batch.items()}
    real = batch["attention_mask"].bool()
    wanted = logits(model, batch)
    actual = logits(model, {**batch, "attention_mask": FORMS[form](batch["attention_mask"])})
    torch.testing.assert_close(actual[real], wanted[real], **CLOSE)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("start", [0, 4])
@pytest.mark.parametrize(
    "row",
    ["11111111", "00011111", "11111100", "00111110", "11110011"],
    ids=["full", "left", "right", "both", "middle"],
)
def test_padding_is_read_from_every_form(row, start, form):
    mask = torch.tensor([[int(bit) for bit in row], [1] * 8])
    whole = FORMS[form](mask)
    queries = (
        {kind: part[:, :, start:] for kind, part in whole.items()} if isinstance(whole, dict) else whole[:, :, start:]
    )
    expected = mask.bool().repeat_interleave(2, 0)
    assert torch.equal(real_tokens(queries, 4, start, 8 - start, mask.device), expected)
    assert torch.equal(real_tokens(mask, 4, start, 8 - start, mask.device), expected)


def test_free_places_of_a_static_cache_are_no_tokens():
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    wide = causal(mask, keys=10)
    assert torch.equal(real_tokens(wide[:, :, 2:], 1, 2, 4, mask.device), mask.bool())
    assert torch.equal(real_tokens(torch.nn.functional.pad(mask, (0, 4)), 1, 2, 4, mask.device), mask.bool())


def test_tokens_that_attend_both_ways_are_real():
    mask = causal(torch.tensor([[0, 0, 1, 1, 1, 1]]))
    mask[:, :, 2:5, 2:5] = True  # an image of Gemma 3, a prefix of PaliGemma
    assert torch.equal(real_tokens(mask, 1, 0, 6, mask.device)[0], torch.tensor([0, 0, 1, 1, 1, 1]).bool())


_SECOND = torch.arange(8) >= 4
BAD = {
    "a window": (lambda: causal(torch.ones(2, 8)).triu(-2), "more than causal"),
    "two texts": (
        lambda: causal(torch.ones(2, 8)) & (torch.arange(8) >= 4).eq((torch.arange(8) >= 4)[:, None]),
        "more",
    ),
    "nothing": (lambda: torch.zeros(2, 1, 8, 8).bool(), "more than causal"),
    "this call alone": (lambda: torch.ones(2, 4), r"has the shape \(2, 4\), but the call has 8 tokens"),
    "other tokens": (lambda: causal(torch.ones(2, 9)), r"\(2, 1, 9, 9\)"),
    "another number of axes": (lambda: torch.ones(2, 8, 8), "cannot tell padding"),
    "another kind": (lambda: "block mask", "a str, from which MoReS cannot tell padding"),
    "other rows": (lambda: torch.ones(3, 8), "3 rows"),
}


@pytest.mark.parametrize("kind", BAD)
def test_masks_that_do_not_tell_padding_are_refused(kind):
    make, message = BAD[kind]
    with pytest.raises(ValueError, match=message):
        real_tokens(make(), 2, 0, 8, torch.device("cpu"))


# ---------------------------------------------------------------------- several texts in a row


def test_packed_rows_are_refused_where_tokens_are_counted():
    ids = torch.arange(3, 15)[None]
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
    with pytest.raises(ValueError, match="position_ids begin anew"):
        adapted("loreft")(input_ids=ids, position_ids=positions)
    torch.testing.assert_close(
        logits(adapted("loreft"), {"input_ids": ids, "position_ids": torch.arange(12)[None]}),
        logits(adapted("loreft"), {"input_ids": ids}),
    )
    image = torch.where((ids > 5) & (ids < 10), IMAGE, ids)
    with pytest.raises(ValueError, match="position_ids begin anew"):  # inside what looks like one image
        adapted("llava")(input_ids=image, position_ids=positions)
    logits(adapted("llava"), {"input_ids": image.roll(4, 1), "position_ids": positions})


def test_texts_begin_where_positions_go_back():
    real = torch.ones(1, 6, dtype=torch.bool)
    assert packed_starts(torch.tensor([[0, 1, 2, 0, 0, 1]]), real).nonzero()[:, 1].tolist() == [3, 4]
    assert not packed_starts(
        torch.tensor([[0, 0, 0, 1, 2, 3]]), real & torch.tensor([[0, 0, 1, 1, 1, 1]]).bool()
    ).any()
    axes = torch.tensor([[0, 1, 1, 1, 1, 3], [0, 1, 1, 2, 2, 3], [0, 1, 2, 1, 2, 3]])[:, None]  # Qwen-VL's image
    assert not packed_starts(axes, real).any()
    assert not packed_starts(None, real).any()
