"""Which tokens are steered in a model, found by what its layers change."""

import pytest
import torch
from peft import get_peft_model
from transformers import DynamicCache, LlamaForSequenceClassification

from peft_ext import MoReSConfig, visual_tokens
from tests._models.vision_language import IMAGE, PAD, build, inputs, text_config
from tests.contract._common import fill, logits
from tests.tuners.mores._cases import text_model
from tests.tuners.mores._common import adapted, changed, changed_tokens, ends


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("ratio", [0.01, 0.3, 1.0])
def test_ends_of_each_image(padding, ratio):
    batch = inputs(texts=((3, 4), (7, 2), None), padding=padding)
    assert torch.equal(changed(adapted(token_ratio=ratio), batch), ends(batch["input_ids"], ratio))


def test_several_images_in_one_sample():
    first, second = inputs(texts=((3, 2),)), inputs(texts=((2, 4),))
    batch = {
        "input_ids": torch.cat([first["input_ids"], second["input_ids"]], dim=1),
        "pixel_values": torch.cat([first["pixel_values"], second["pixel_values"]]),
    }
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    each = torch.cat([ends(first["input_ids"], 0.25), ends(second["input_ids"], 0.25)], dim=1)
    assert torch.equal(changed(adapted(), batch), each)
    together = changed(adapted(token_grouping="sample"), batch)
    places = (batch["input_ids"] == IMAGE).nonzero()[:, 1].tolist()
    assert together.nonzero()[:, 1].tolist() == places[:4] + places[-4:]


def test_a_mask_overrides_what_input_ids_say():
    batch = inputs()
    mask = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    mask[0, 1:3] = mask[1, 5:9] = True
    model = adapted(token_selection="all")
    assert torch.equal(changed(model, batch, visual_token_mask=mask), mask)
    assert torch.equal(changed(model, batch), batch["input_ids"] == IMAGE)  # and is forgotten after the call


def test_embeddings_need_a_mask():
    batch = inputs()
    model = adapted()
    embeddings = model.get_input_embeddings()(batch["input_ids"]).detach()
    call = {"inputs_embeds": embeddings, "attention_mask": batch["attention_mask"]}
    with pytest.raises(RuntimeError, match="visual_token_mask"):
        model(**call)
    mask = batch["input_ids"] == IMAGE
    chosen = ends(batch["input_ids"], 0.25)
    assert torch.equal(changed(model, call, visual_token_mask=mask), chosen)
    with visual_tokens(model, mask):
        steps = changed_tokens(model, lambda: model.generate(**call, max_new_tokens=3, min_new_tokens=3))
    assert torch.equal(steps[0], chosen) and not any(step.any() for step in steps[1:])
    with pytest.raises(RuntimeError, match="visual_token_mask"):
        model.generate(**call, max_new_tokens=1)


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(2, 5, dtype=torch.bool),
        torch.ones(2, 27),
        torch.ones(27, dtype=torch.bool),
        torch.tensor(True),
        torch.ones(0, 27, dtype=torch.bool),
        [[True] * 27] * 2,
    ],
    ids=["too short", "not bool", "one row", "one number", "no rows", "a list"],
)
def test_a_mask_that_does_not_fit_is_refused(mask):
    batch = inputs()
    assert batch["input_ids"].shape == (2, 27)
    with pytest.raises(ValueError, match=r"visual_token_mask must be a bool tensor of shape \(2, 27\)"):
        adapted()(**batch, visual_token_mask=mask)


def test_a_failed_call_leaves_nothing_behind():
    batch, model = inputs(), adapted()
    expected = logits(model, batch)
    with pytest.raises(ValueError, match="visual_token_mask"):
        model(**batch, visual_token_mask=torch.ones(1, 1, dtype=torch.bool))
    assert torch.equal(logits(model, batch), expected)


def test_an_interrupted_call_leaves_nothing_behind():
    batch, model = inputs(), adapted()
    expected = logits(model, batch)

    def interrupt(*args):
        raise KeyboardInterrupt

    handle = model.get_base_model().get_decoder().register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**inputs(texts=(None, None)))
    handle.remove()
    assert torch.equal(logits(model, batch), expected)


def test_replicas_of_data_parallel_are_refused():
    model = adapted()
    model.get_base_model()._is_replica = True
    with pytest.raises(RuntimeError, match="torchrun"):
        model(**inputs())


def test_a_mask_that_does_not_fit_a_continued_text_is_refused():
    first, model = inputs(texts=((3, 4),)), adapted()
    cache = DynamicCache(config=model.config.text_config)
    logits(model, first, past_key_values=cache)
    with pytest.raises(ValueError, match=r"shape \(1, 3\)"):
        model(torch.ones(1, 3).long(), past_key_values=cache, visual_token_mask=first["input_ids"] == IMAGE)


def test_masks_around_calls_are_checked_at_once_and_nest():
    batch, model = inputs(), adapted()
    outer = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    outer[:, 3] = True
    with visual_tokens(model, outer):
        with visual_tokens(model, batch["input_ids"] == IMAGE):
            assert torch.equal(changed(model, batch), ends(batch["input_ids"], 0.25))
        assert torch.equal(changed(model, batch), outer)
        with pytest.raises(ValueError, match=r"\(batch, tokens\).*a list"), visual_tokens(model, [[True]]):
            pass
        assert torch.equal(changed(model, batch), outer)


def test_visual_tokens_needs_an_adapter():
    with pytest.raises(ValueError, match="without a MoReS adapter"), visual_tokens(build(), torch.ones(1, 1)):
        pass


def test_a_second_image_in_a_conversation_with_a_cache():
    """A later turn with its own image is steered there, as it is without a cache."""
    first, second = inputs(texts=((3, 2),)), inputs(texts=((2, 4),))
    ids = torch.cat([first["input_ids"], second["input_ids"]], dim=1)
    pixels = torch.cat([first["pixel_values"], second["pixel_values"]])
    model = adapted()
    expected = logits(model, {"input_ids": ids, "pixel_values": pixels})[:, first["input_ids"].shape[1] :]
    cache = DynamicCache(config=model.config.text_config)
    logits(model, first, past_key_values=cache)
    second = {**second, "attention_mask": torch.ones_like(ids)}
    torch.testing.assert_close(logits(model, second, past_key_values=cache), expected, atol=1e-4, rtol=1e-3)


def test_the_inner_model_called_directly():
    batch, model = inputs(), adapted()
    with torch.no_grad():
        hidden = model.get_base_model().model(**batch).last_hidden_state
        assert torch.equal(model.get_output_embeddings()(hidden), logits(model, batch))


def test_the_decoder_called_directly_with_text_is_untouched():
    ids = inputs(texts=(None,))["input_ids"]
    steered, plain = adapted().get_base_model().get_decoder(), build().get_decoder()
    with torch.no_grad():
        assert torch.equal(steered(input_ids=ids).last_hidden_state, plain(input_ids=ids).last_hidden_state)
        with pytest.raises(RuntimeError, match="input_ids"):
            steered(inputs_embeds=steered.embed_tokens(ids))


def test_positional_input_ids():
    batch = inputs(texts=(None,))
    model = adapted(token_positions="l1")
    with torch.no_grad():
        assert torch.equal(model(batch["input_ids"]).logits, logits(model, {"input_ids": batch["input_ids"]}))


# ---------------------------------------------------------------------- text: LoReFT


def loreft(**options):
    options = {"rank": 8, "token_positions": "f2+l3", "layers_to_transform": "all", **options}
    return fill(get_peft_model(text_model(), MoReSConfig(**options)).eval())


@pytest.mark.parametrize("padding", ["left", "right"])
def test_text_positions_are_counted_without_padding(padding):
    batch = inputs(texts=((3, 4), (9, 9)), padding=padding)
    batch = {key: batch[key] for key in ("input_ids", "attention_mask")}
    expected = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    for row, tokens in enumerate(batch["input_ids"]):
        places = (tokens != PAD).nonzero().flatten().tolist()
        expected[row, places[:2] + places[-3:]] = True
    assert torch.equal(changed(loreft(), batch), expected)


def test_text_positions_end_before_the_first_label():
    ids = torch.arange(3, 15).repeat(2, 1)
    labels = ids.clone()
    labels[0, :7] = labels[1, :9] = -100
    expected = torch.zeros_like(ids, dtype=torch.bool)
    expected[0, [0, 1, 4, 5, 6]] = expected[1, [0, 1, 6, 7, 8]] = True
    assert torch.equal(changed(loreft(), {"input_ids": ids, "labels": labels}), expected)


def test_one_class_per_sample_ends_no_prompt():
    ids = torch.arange(3, 15).repeat(2, 1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = LlamaForSequenceClassification(text_config(num_labels=2))
    config = MoReSConfig(rank=1, token_positions="f1", task_type="SEQ_CLS")
    model = fill(get_peft_model(base, config))
    expected = torch.zeros_like(ids, dtype=torch.bool)
    expected[:, 0] = True
    assert torch.equal(changed(model, {"input_ids": ids, "labels": torch.tensor([0, 1])}), expected)


def test_a_batch_without_a_prompt_is_refused():
    ids = torch.arange(3, 15).repeat(2, 1)
    with pytest.raises(ValueError, match="no prompt to steer"):
        loreft()(input_ids=ids, labels=ids)


def test_text_positions_leave_out_visual_tokens():
    batch = inputs(texts=((3, 4),))
    steered = changed(adapted(token_positions="f5+l1", layers_to_transform="all"), batch)
    # vision markers are text
    assert steered.nonzero()[:, 1].tolist() == [0, 1, 2, 3, 20, 24]


def test_all_layers_are_the_default_for_text():
    model = get_peft_model(text_model(), MoReSConfig(token_positions="l1"))
    assert len(model.peft_config["default"].target_modules) == 3


def test_last_tokens_of_a_language_model_trained_without_labels_are_a_warning(recwarn):
    model = get_peft_model(text_model(), MoReSConfig(token_positions="f1+l1"))
    ids = torch.tensor([[3, 4, 5, 6]])
    labels = torch.tensor([[-100, -100, 5, 6]])
    model.train()(input_ids=ids, labels=labels)
    model.eval()(input_ids=ids)
    get_peft_model(text_model(), MoReSConfig(token_positions="f1")).train()(input_ids=ids)
    assert not [w for w in recwarn if "token_positions" in str(w.message)]
    with pytest.warns(UserWarning, match="trained without labels, so the last tokens of the whole input"):
        model.train()(input_ids=ids)
