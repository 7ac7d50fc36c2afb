"""Pretrained encoders get regions without losing anything, and the fact search embeds as its variant says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ck import CKProcessor, FactSearch, FactSearchConfig, load_encoder
from ck.data.samples import geometry
from ck.model.losses import SEARCH_LOSSES
from transformers import AutoModel, BertConfig, BertModel, GPT2Config, GPT2Model, VisualBertConfig, VisualBertModel

from tests.examples.ck_transformer.conftest import ENCODER_CONFIGS, FEATURE_SIZE, SAMPLES, TOKENIZER, features


SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 99,
}
IDS = torch.tensor([[3, 40, 41, 2]])


@torch.no_grad()
def test_bert_keeps_all_it_knows_of_text(tmp_path: Path) -> None:
    torch.manual_seed(0)
    bert = BertModel(BertConfig(**SIZES, initializer_range=0.3)).eval()
    bert.save_pretrained(tmp_path)
    encoder = load_encoder(tmp_path, FEATURE_SIZE)
    expected = bert(input_ids=IDS).last_hidden_state
    torch.testing.assert_close(encoder(input_ids=IDS).last_hidden_state, expected, atol=1e-5, rtol=1e-5)
    embeddings = encoder.embeddings
    assert torch.equal(embeddings.visual_token_type_embeddings.weight, bert.embeddings.token_type_embeddings.weight)
    assert embeddings.visual_projection.in_features == FEATURE_SIZE + 7


@torch.no_grad()
def test_visual_bert_gets_geometry_that_changes_nothing_at_first(tmp_path: Path) -> None:
    torch.manual_seed(0)
    old = VisualBertModel(VisualBertConfig(**SIZES, visual_embedding_dim=FEATURE_SIZE, initializer_range=0.3)).eval()
    old.save_pretrained(tmp_path / "old")
    encoder = load_encoder(tmp_path / "old", FEATURE_SIZE)
    V, G = features(SAMPLES[0])[None], geometry(SAMPLES[0].boxes, SAMPLES[0].size)[None]
    mask, regions = torch.ones_like(IDS), torch.ones(1, 3).long()
    hidden = old(input_ids=IDS, visual_embeds=V, visual_attention_mask=regions).last_hidden_state
    cls, at_regions = encoder.encode(IDS, mask, V, G, regions)
    torch.testing.assert_close(torch.cat([cls[:, None], at_regions], 1), hidden[:, [0, 4, 5, 6]], atol=1e-5, rtol=1e-5)
    encoder.save_pretrained(tmp_path / "new")  # a second time, nothing is added
    again = load_encoder(tmp_path / "new", FEATURE_SIZE).encode(IDS, mask, V, G, regions)
    assert torch.equal(again[1], at_regions)


@pytest.mark.parametrize("family", list(ENCODER_CONFIGS))
def test_regions_are_embedded_as_in_equation_1(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = FactSearchConfig(encoder_config=ENCODER_CONFIGS[family], feature_size=FEATURE_SIZE).make_encoder().eval()
    V, G = features(SAMPLES[0])[None].requires_grad_(), geometry(SAMPLES[0].boxes, SAMPLES[0].size)[None]
    G.requires_grad_()
    mask = torch.ones(1, 3).long()
    encoder.encode(IDS, torch.ones_like(IDS), V, G, mask)[1].square().sum().backward()
    assert (V.grad.abs().sum(-1) > 0).all() and (G.grad.abs() > 0).all()
    if family == "visual_bert":
        seen = []
        encoder.embeddings.register_forward_hook(lambda module, args, output: seen.append(output[:, 4:]))
        encoder.encode(IDS, torch.ones_like(IDS), V, G, mask)
        e = encoder.embeddings
        weight, bias = e.visual_projection.weight, e.visual_projection.bias
        segment = e.visual_token_type_embeddings.weight[1] + e.visual_position_embeddings.weight[0]
        plain = V @ weight[:, :FEATURE_SIZE].T + G @ weight[:, FEATURE_SIZE:].T + bias + segment
        torch.testing.assert_close(seen[0], e.LayerNorm(plain))


@pytest.mark.parametrize("family", ["lxmert", "vilt"])
def test_other_encoders_are_loaded_whole(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = ENCODER_CONFIGS[family].to_dict() | {"visual_feat_dim": FEATURE_SIZE}
    pretrained = AutoModel.from_config(type(ENCODER_CONFIGS[family])(**config))
    pretrained.save_pretrained(tmp_path)
    encoder = load_encoder(tmp_path, FEATURE_SIZE)
    weights = encoder.state_dict()
    kept = {name: value for name, value in pretrained.state_dict().items() if "pooler" not in name}
    assert all(torch.equal(weights[name], value) for name, value in kept.items())


def test_encoders_that_do_not_fit_are_explained(tmp_path: Path) -> None:
    GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9)).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match="holds a gpt2 model; region features can go into: bert, visual_bert"):
        load_encoder(tmp_path / "gpt2", 4)
    VisualBertModel(VisualBertConfig(**SIZES, visual_embedding_dim=6)).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="trained with region features of width 6; these have 4"):
        load_encoder(tmp_path / "other", 4)


def make_search(variant: str) -> FactSearch:
    torch.manual_seed(0)
    encoder = ENCODER_CONFIGS["visual_bert"]
    model = FactSearch(FactSearchConfig(encoder_config=encoder, feature_size=FEATURE_SIZE, variant=variant)).eval()
    sample = SAMPLES[0]
    model.set_mean(features(sample), geometry(sample.boxes, sample.size))
    return model


@pytest.mark.parametrize("variant", ["text", "multimodal"])
@torch.no_grad()
def test_only_the_multimodal_search_sees_the_image(variant: str, tmp_path: Path) -> None:
    model, process = make_search(variant), CKProcessor(TOKENIZER)
    ids, mask = process.texts(["a dudu can cut wood"] * 2)
    embedded = model.embed(ids, mask, *process.regions(SAMPLES, features).values())
    torch.testing.assert_close(embedded.norm(dim=-1), torch.ones(2))
    assert torch.allclose(embedded[0], embedded[1], atol=1e-6) == (variant == "text")
    model.save_pretrained(tmp_path)  # with the mean of the regions
    loaded = FactSearch.from_pretrained(tmp_path)
    assert torch.equal(loaded.embed(ids, mask, *process.regions(SAMPLES, features).values()), embedded)


@torch.no_grad()
def test_similarity_is_the_cosine_at_cls_and_losses_compare_it_with_the_target() -> None:
    model, process = make_search("multimodal"), CKProcessor(TOKENIZER)
    ids, mask = process.texts([sample.expression for sample in SAMPLES])
    fact_ids, fact_mask = process.texts(["a dudu can cut wood", "rope"])
    regions = process.regions(SAMPLES, features)
    labels = torch.tensor([1.0, 0.0])
    cosine = model(ids, mask, fact_ids, fact_mask, **regions).logits
    first, second = (model.encoder.encode(i, m, *regions.values())[0] for i, m in ((ids, mask), (fact_ids, fact_mask)))
    torch.testing.assert_close(cosine, torch.cosine_similarity(first, second, dim=-1))
    torch.testing.assert_close(SEARCH_LOSSES["mse"](cosine, labels), ((cosine - labels) ** 2).mean())
    targets = 2 * labels - 1
    expected = torch.nn.functional.cosine_embedding_loss(first, second, targets)
    torch.testing.assert_close(SEARCH_LOSSES["hinge"](cosine, labels), expected)
