"""ModuleKnockout against the dense reference, in every family."""

import pytest
import torch

from peft_ext.knockout import AttentionKnockout, ModuleKnockout
from tests._models.vision_language import FAMILIES, LAYERS, prepared

from ._reference import decoder_embeddings, llama_logits
from ._runs import generated, logits


@pytest.mark.parametrize("module", ["attention", "mlp"])
def test_equals_the_dense_reference(module):
    model, batch, groups = prepared("llava")
    attended = batch["attention_mask"].bool()
    with torch.no_grad():
        embeddings = decoder_embeddings(model, batch)
        zeroed = {(layer, module): groups["question"] for layer in (0, 2)}
        expected = llama_logits(model, embeddings, attended, zeroed=zeroed)
    with ModuleKnockout(model, [0, 2], groups["question"], module):
        knocked = logits(model, batch)
    torch.testing.assert_close(knocked[attended], expected[attended], rtol=0, atol=2e-6)
    assert (knocked - logits(model, batch)).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_without_any_module_the_embedding_stays(family):
    model, batch, groups = prepared(family)
    with (
        ModuleKnockout(model, range(LAYERS), groups["question"], "attention"),
        ModuleKnockout(model, range(LAYERS), groups["question"], "mlp"),
        torch.no_grad(),
    ):
        states = model(**batch, output_hidden_states=True).hidden_states
    rows = groups["question"]
    assert torch.equal(states[0][rows], states[LAYERS - 1][rows])
    assert not torch.equal(states[0][~rows], states[LAYERS - 1][~rows])


def test_positions_follow_the_cache():
    """Zeroing the last position while generating equals zeroing it, and what follows, in one pass."""
    model, batch, groups = prepared("llama", texts=((3, 7),))
    with ModuleKnockout(model, [1], groups["last"], "mlp"):
        scores, tokens = generated(model, batch)
    ids = tokens[:, :-1]
    length = batch["input_ids"].shape[1]
    late = torch.arange(ids.shape[1])[None] >= length - 1
    with ModuleKnockout(model, [1], late, "mlp"):
        expected = logits(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    torch.testing.assert_close(scores[:, 0], expected[0, length - 1 :], rtol=1e-4, atol=1e-5)


def test_beside_an_attention_knockout():
    model, batch, groups = prepared("llava")
    attended = batch["attention_mask"].bool()
    blocked = groups["image"][:, None] & groups["last"][:, :, None]
    with torch.no_grad():
        embeddings = decoder_embeddings(model, batch)
        expected = llama_logits(model, embeddings, attended, {2: blocked}, {(2, "mlp"): groups["question"]})
    with (
        AttentionKnockout(model, [2], [(groups["image"], groups["last"])]),
        ModuleKnockout(model, [2], groups["question"], "mlp"),
    ):
        torch.testing.assert_close(logits(model, batch)[attended], expected[attended], rtol=0, atol=2e-6)
