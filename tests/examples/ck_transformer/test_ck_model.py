"""CK-Transformer's classifier against a plain loop over candidates and facts, and as a model of transformers."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ck import CKProcessor, CKTransformer, CKTransformerConfig
from ck.data.samples import Sample, geometry
from ck.model.losses import CLASSIFIER_LOSSES
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModel, GPT2Config, VisualBertConfig

from peft_ext import GPSConfig, NeuroAdaConfig, gradient_scores
from tests.examples.ck_transformer.conftest import ENCODER_CONFIGS, FACTS, FEATURE_SIZE, SAMPLES, TOKENIZER, features


TARGETS = r".*encoder\.layer\.\d+\..*(query|key|value|dense)"
FAMILIES = list(ENCODER_CONFIGS)


def make(family: str = "visual_bert", **options: Any) -> CKTransformer:
    torch.manual_seed(0)
    config = CKTransformerConfig(
        encoder_config=ENCODER_CONFIGS[family],
        feature_size=FEATURE_SIZE,
        num_heads=2,
        **options,
    )
    return CKTransformer(config).eval()


def batch_of(**options: Any) -> dict[str, Tensor]:
    return dict(CKProcessor(TOKENIZER, **options)(SAMPLES, features, FACTS))


def attend(attention: torch.nn.MultiheadAttention, query: Tensor, keys: Tensor) -> Tensor:
    """Multi-head attention of one query `[hidden]` on keys that are values too, `[count, hidden]`, head by head."""
    weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, keys, keys), weights, biases, strict=True))
    size = attention.head_dim
    heads = []
    for start in range(0, len(query), size):
        own = slice(start, start + size)
        shares = torch.softmax(k[:, own] @ q[own] / math.sqrt(size), 0)
        heads.append(shares @ v[:, own])
    return attention.out_proj(torch.cat(heads))


def plain_score(model: CKTransformer, sample: Sample, candidate: int, facts: list[str]) -> Tensor:
    """The score of one candidate, with one text at a time and no padding."""

    def at_candidate(text: str) -> Tensor:
        ids = torch.tensor([TOKENIZER(text)["input_ids"]])
        n = len(sample.boxes)
        regions = features(sample)[None], geometry(sample.boxes, sample.size)[None], torch.ones(1, n).long()
        return model.encoder.encode(ids, torch.ones_like(ids), *regions)[1][0, candidate]

    hidden = at_candidate(sample.expression)
    keys = torch.stack([at_candidate(fact) for fact in facts]) if facts else model.integrator.null.weight
    for block in model.integrator.blocks:
        hidden = block.attention_norm(hidden + attend(block.attention, hidden, keys))
        first, _, second = block.feed_forward
        hidden = block.output_norm(hidden + second(F.gelu(first(hidden))))
    return model.scorer(hidden)[0]


@pytest.mark.parametrize(
    ("family", "count"), [*((family, 3) for family in FAMILIES), *(("vilt", k) for k in (0, 1, 5))]
)
@torch.no_grad()
def test_scores_equal_a_plain_loop_over_candidates(family: str, count: int) -> None:
    model = make(family)
    logits = model(**batch_of(num_facts=count)).logits
    assert logits.shape == (2, 3)
    for number, (sample, own) in enumerate(zip(SAMPLES, FACTS, strict=True)):
        for candidate in range(len(sample.boxes)):
            expected = plain_score(model, sample, candidate, own[candidate][:count])
            torch.testing.assert_close(logits[number, candidate], expected, atol=1e-5, rtol=1e-5)
    assert logits[1, 2] == torch.finfo(logits.dtype).min  # there is no third candidate
    assert logits.std() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_permuted_candidates_have_permuted_scores(family: str) -> None:
    model, order = make(family), [2, 0, 1]
    first = SAMPLES[0]
    boxes, categories = (tuple(values[i] for i in order) for values in (first.boxes, first.categories))
    moved = Sample("m", "moved", first.size, boxes, categories, first.expression, 0)
    process = CKProcessor(TOKENIZER)
    scores = model(**process([first], features, FACTS[:1])).logits
    permuted = model(**process([moved], features, [[FACTS[0][i] for i in order]])).logits
    torch.testing.assert_close(permuted, scores[:, order], atol=1e-5, rtol=1e-5)
    assert (scores - permuted).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_padding_and_chunks_leave_scores_as_they_are(family: str) -> None:
    model, together = make(family), batch_of(num_facts=5)
    logits = model(**together).logits
    for number, sample in enumerate(SAMPLES):
        alone = model(**CKProcessor(TOKENIZER, num_facts=5)([sample], features, [FACTS[number]])).logits[0]
        torch.testing.assert_close(logits[number, : len(alone)], alone, atol=1e-5, rtol=1e-5)
    model.config.rows_per_chunk = 2
    torch.testing.assert_close(model(**together).logits, logits, atol=1e-5, rtol=1e-5)
    together["region_features"][1, 2] = 1e3  # what stands in the padding does not matter
    together["region_geometry"][1, 2] = -1e3
    torch.testing.assert_close(model(**together).logits, logits, atol=1e-5, rtol=1e-5)


def test_equal_facts_of_an_image_are_one_row() -> None:
    batch = batch_of(num_facts=5)
    assert batch["fact_attention_mask"].any(-1).sum(1).tolist() == [3, 5]
    assert batch["fact_index"][1, 1].tolist() == [1, -1, -1, -1, -1]
    assert batch["labels"].tolist() == [1, 0]


@torch.no_grad()
def test_without_facts_every_fact_is_one_mask_token() -> None:
    batch = batch_of(no_facts=True)
    ids = [TOKENIZER.cls_token_id, TOKENIZER.mask_token_id, TOKENIZER.sep_token_id]
    assert batch["fact_input_ids"].tolist() == [[ids], [ids]]
    assert batch["fact_index"][0].tolist() == [[0, 0, -1], [0, -1, -1], [-1, -1, -1]]
    others = [[["rope"] * len(set(own)) for own in candidates] for candidates in FACTS]
    again = CKProcessor(TOKENIZER, no_facts=True)(SAMPLES, features, others)
    assert torch.equal(make()(**batch).logits, make()(**again).logits)


@pytest.mark.parametrize("loss", list(CLASSIFIER_LOSSES))
def test_losses_pass_over_missing_targets(loss: str) -> None:
    scores = torch.tensor([[1.0, 3.0, -2.0], [0.5, 0.0, 9.0]], requires_grad=True)
    known = {
        "cross_entropy": -torch.log_softmax(scores[0], 0)[1],
        "margin": (1 - scores[0, 1] + scores[0, [0, 2]]).clamp(min=0).sum(),
    }
    compute = CLASSIFIER_LOSSES[loss]
    torch.testing.assert_close(compute(scores, torch.tensor([1, -100])), known[loss])
    assert compute(scores, torch.tensor([-100, -100])) == 0
    two = compute(scores, torch.tensor([1, 1]))
    torch.testing.assert_close(
        two, (compute(scores[:1], torch.tensor([1])) + compute(scores[1:], torch.tensor([1]))) / 2
    )


def test_checkpointing_leaves_gradients_as_they_are() -> None:
    plain, checkpointed = make(dropout=0.0).train(), make(dropout=0.0).train()
    for module in (*plain.modules(), *checkpointed.modules()):
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    checkpointed.gradient_checkpointing_enable()
    for model in (plain, checkpointed):
        model(**batch_of()).loss.backward()
    gradients = dict(checkpointed.named_parameters())
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name].grad, parameter.grad, msg=name)


def test_model_and_processor_are_saved_and_loaded_bit_for_bit(tmp_path: Path) -> None:
    model, process = make(num_blocks=1), CKProcessor(TOKENIZER, num_facts=1)
    model.save_pretrained(tmp_path)
    process.save_pretrained(tmp_path)
    loaded, again = AutoModel.from_pretrained(tmp_path), CKProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, CKTransformer) and again.num_facts == 1
    batch, other = process(SAMPLES, features, FACTS), again(SAMPLES, features, FACTS)
    assert all(torch.equal(batch[name], other[name]) for name in batch)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("method", ["neuroada", "gps", "lora"])
def test_adapters_train_save_load_and_merge(method: str, tmp_path: Path) -> None:
    base, batch = make(), batch_of()
    shared = {"target_modules": TARGETS, "modules_to_save": ["integrator", "scorer"]}
    config: Any = LoraConfig(r=2, **shared) if method == "lora" else NeuroAdaConfig(k=1, **shared)
    if method == "gps":
        scores = gradient_scores(base, [batch], "model", progress=False)
        config = GPSConfig(k=1, **shared).with_scores(scores)
    model = get_peft_model(copy.deepcopy(base), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.02)
    losses = []
    for _ in range(30):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    with torch.no_grad():
        trained = model.eval()(**batch).logits
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
        assert torch.equal(loaded(**batch).logits, trained)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(**batch).logits, trained, atol=1e-5, rtol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(AutoModel.from_pretrained(tmp_path / "merged")(**batch).logits, merged(**batch).logits)


def test_sizes_at_the_thesis_dimensions() -> None:
    with torch.device("meta"):
        model = CKTransformer(CKTransformerConfig(encoder_config=VisualBertConfig()))
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    words = model.encoder.get_input_embeddings().weight.numel()
    assert round((counts["encoder"] - words) / 1e6) == 87  # the thesis prints 86 for UNITER
    assert round(counts["integrator"] / 1e6) == 14  # and 34 for a classifier whose sizes it does not give


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss": "nothing"}, "loss='nothing' is not known; choose one of cross_entropy, margin"),
        ({"num_blocks": 0}, "num_blocks=0 must be at least 1"),
        ({"num_heads": 3}, "num_heads=3 must divide"),
        ({"encoder_config": GPT2Config()}, "'gpt2' is not known; choose one of visual_bert, lxmert, vilt"),
    ],
)
def test_wrong_configs_are_explained(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        CKTransformerConfig(**{"encoder_config": ENCODER_CONFIGS["visual_bert"], **options})
