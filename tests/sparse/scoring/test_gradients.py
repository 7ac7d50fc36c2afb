"""Gradient scores against ordinary backward passes that keep every gradient; and that a pass leaves nothing behind."""

import copy
import random
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import ConvNextConfig, ConvNextForImageClassification, SwinConfig, SwinForImageClassification

from peft_ext import NeuroAdaConfig, SupervisedContrastiveLoss, gradient_scores
from peft_ext.sparse.bases.neurons import is_supported
from tests.contract._untouched import Untouched
from tests.sparse._probes import peak_bytes


CONVNEXT = {"num_channels": 1, "patch_size": 2, "hidden_sizes": [8, 12], "depths": [1, 1], "num_stages": 2}
SWIN = {"image_size": 8, "num_channels": 1, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2]}


@pytest.fixture(scope="session")
def build(tiny):
    """Function: name of a classifier to a new copy of it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = {
            "convnext": ConvNextForImageClassification(ConvNextConfig(**CONVNEXT, num_labels=3)),
            "swin": SwinForImageClassification(SwinConfig(**SWIN, window_size=2, num_labels=3)),
        }
    return lambda name: copy.deepcopy(made[name]).eval() if name in made else tiny(name)


def batches_for(name, count=3):
    generator = torch.Generator().manual_seed(0)
    labels = [torch.tensor([0, 1, 2, 2, 1, 0]), torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([2, 1, 2, 1, 2, 1])]
    if name == "bert":
        inputs = [{"input_ids": torch.randint(3, 64, (6, 5), generator=generator)} for _ in range(count)]
    else:
        inputs = [{"pixel_values": torch.randn(6, 1, 8, 8, generator=generator)} for _ in range(count)]
    return [{**entry, "labels": label} for entry, label in zip(inputs, labels, strict=False)]


def weights_of(model):
    return {
        name: module.weight
        for name, module in model.named_modules()
        if is_supported(module, None) and not name.startswith("classifier")
    }


def pooled(name, model, batch):
    """The features, by another way than the head's input."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    output = getattr(model, name)(**inputs)
    return output.last_hidden_state[:, 0] if name == "vit" else output.pooler_output


def kept_gradients(name, model, batches, loss, absolute):
    """The sums over the batches, from passes that keep every gradient."""
    model.requires_grad_(True)
    sums = {key: torch.zeros_like(weight) for key, weight in weights_of(model).items()}
    for batch in batches:
        loss(pooled(name, model, batch), batch["labels"]).backward()
        for key, weight in weights_of(model).items():
            sums[key] += weight.grad.abs() if absolute else weight.grad
        model.zero_grad()
    return sums


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("name", ["vit", "bert", "swin", "convnext"])
def test_scores_are_the_summed_gradients(build, name, absolute):
    batches, loss = batches_for(name), SupervisedContrastiveLoss(temperature=0.07)
    scores = gradient_scores(build(name), batches, absolute=absolute)
    expected = kept_gradients(name, build(name), batches, loss, absolute)
    assert scores.keys() == expected.keys()
    for key, score in scores.items():
        assert score.dtype == torch.float32 and score.any(), key
        torch.testing.assert_close(score, expected[key], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("features", ["classifier", lambda output: output.logits], ids=["module", "function"])
def test_features_come_from_where_they_are_asked_from(build, features):
    batches = batches_for("vit", 1)
    scores = gradient_scores(build("vit"), batches, nn.functional.cross_entropy, features=features)
    model = build("vit").requires_grad_(True)
    model(**batches[0]).loss.backward()
    for key, weight in weights_of(model).items():
        torch.testing.assert_close(scores[key], weight.grad, atol=1e-6, rtol=1e-4)


def test_an_output_of_three_dimensions_is_no_list_of_samples(build):
    with pytest.raises(ValueError, match=r"features='vit.layernorm': the features are of shape \(6, 5, 32\)"):
        gradient_scores(build("vit"), batches_for("vit", 1), nn.functional.cross_entropy, features="vit.layernorm")


def test_the_models_own_loss(tiny, ids):
    scores = gradient_scores(tiny("gpt2"), [{"input_ids": ids, "labels": ids}], "model")
    model = tiny("gpt2").requires_grad_(True)
    model(ids, labels=ids).loss.backward()
    assert "lm_head" not in scores
    for key, score in scores.items():
        torch.testing.assert_close(score, model.get_submodule(key).weight.grad, atol=1e-6, rtol=1e-4)


def test_only_the_configs_targets_are_scored(build):
    config = NeuroAdaConfig(target_modules=["q_proj", "fc1"], exclude_modules=r".*layers\.0\..*")
    scores = gradient_scores(build("vit"), batches_for("vit", 1), config=config)
    assert set(scores) == {"vit.layers.1.attention.q_proj", "vit.layers.1.mlp.fc1"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_gradients_add_up_in_fp32(tiny, dtype):
    batches = [{**batch, "pixel_values": batch["pixel_values"].to(dtype)} for batch in batches_for("vit")]
    scores = gradient_scores(tiny("vit", dtype), batches)
    parts = [gradient_scores(tiny("vit", dtype), [batch]) for batch in batches]
    for key, score in scores.items():
        assert score.dtype == torch.float32
        assert torch.equal(score, sum(part[key] for part in parts)), key
        assert not torch.equal(score, score.to(dtype).float()), key


@pytest.mark.filterwarnings("ignore:offload=True keeps the sums")
def test_offloaded_sums_are_the_same(build, tmp_path):
    expected = gradient_scores(build("vit"), batches_for("vit"))
    for offload in (True, str(tmp_path)):
        scores = gradient_scores(build("vit"), batches_for("vit"), offload=offload)
        assert all(torch.equal(scores[key], expected[key]) for key in expected)
        assert all(score.device.type == "cpu" for score in scores.values())


class Attending(nn.Module):
    def __init__(self, kdim):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, kdim=kdim, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        keys = x[..., : self.attention.kdim]
        return self.head(self.attention(x, keys, x)[0].mean(1))


@pytest.mark.parametrize("kdim", [8, 5], ids=["packed", "separate"])
def test_projections_of_an_attention_are_scored_apart(kdim):
    model = Attending(kdim)
    x, labels = torch.randn(6, 4, 8), torch.tensor([0, 1, 2, 2, 1, 0])
    scores = gradient_scores(model, [(x, labels)])
    features = model.attention(x, x[..., :kdim], x)[0].mean(1)
    SupervisedContrastiveLoss()(features, labels).backward()
    attention = model.attention
    if kdim == 8:
        expected = dict(zip(("q_proj", "k_proj", "v_proj"), attention.in_proj_weight.grad.chunk(3), strict=True))
    else:
        expected = {part: getattr(attention, f"{part}_weight").grad for part in ("q_proj", "k_proj", "v_proj")}
    expected["out_proj"] = attention.out_proj.weight.grad
    assert {name for name in scores if name != "head"} == {f"attention.{part}" for part in expected}
    for part, gradient in expected.items():
        torch.testing.assert_close(scores[f"attention.{part}"], gradient, atol=1e-6, rtol=1e-4)
    model.zero_grad(set_to_none=True)
    config = NeuroAdaConfig(k=1, selection="gradient", train_bias=True, target_modules=["attention"])
    adapted = get_peft_model(model, config.with_scores(scores)).base_model.model.attention
    for part, gradient in expected.items():
        chosen = adapted.parts[part].deltas["default"].indices.long()
        assert torch.equal(gradient.abs().gather(1, chosen)[:, 0], gradient.abs().amax(1)), part


def test_adapted_model_is_scored_under_the_names_of_its_base(build):
    expected = gradient_scores(build("vit"), batches_for("vit", 1))
    scores = gradient_scores(get_peft_model(build("vit"), NeuroAdaConfig(k=1)), batches_for("vit", 1))
    assert scores.keys() == expected.keys()
    for key, score in scores.items():
        torch.testing.assert_close(score, expected[key])


# ------------------------------------------------------------------ memory


@pytest.mark.parametrize("offloaded", [False, True])
def test_one_gradient_is_alive_at_a_time(offloaded, tmp_path):
    """Of sixteen weights of one size an ordinary pass ends with all; this one has the sums, or offloads them."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(128, 128) for _ in range(16)))
    batch = (torch.randn(4, 128), torch.tensor([0, 1, 0, 1]))
    loss = SupervisedContrastiveLoss()
    one = 4 * 128 * 128
    kept = peak_bytes(lambda: loss(model(batch[0]), batch[1]).backward())
    model.zero_grad(set_to_none=True)
    options = {"features": lambda output: output, "offload": str(tmp_path) if offloaded else False}
    peak = peak_bytes(lambda: gradient_scores(model, [batch, batch], **options))
    assert kept > 16 * one and peak < (3 if offloaded else 16 + 3) * one


# ------------------------------------------------------------------ nothing is left behind


class Failure(Exception):
    pass


def failing(batches):
    yield batches[0]
    raise Failure


def state_of(model):
    return (
        [parameter.grad for parameter in model.parameters()],
        [len(parameter._post_accumulate_grad_hooks or ()) for parameter in model.parameters()],
        random.getstate(),
        repr(np.random.get_state()),
    )


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_model_and_random_generators_are_as_before(training, fails):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    model.train()
    model[1].eval()
    model[0].bias.requires_grad_(False)
    model[3].weight.grad = torch.ones(3, 8)
    batch = (torch.randn(6, 4), torch.tensor([0, 1, 0, 1, 2, 2]))
    before, generator = state_of(model), torch.get_rng_state()

    def loader():
        random.random(), np.random.rand(), torch.rand(1)
        yield from failing([batch]) if fails else [batch]

    with Untouched(model), pytest.raises(Failure) if fails else nullcontext():
        gradient_scores(model, loader(), features=lambda output: output, training=training)
    after = state_of(model)
    for old, new in zip(before, after, strict=True):
        assert all(a is b or a == b for a, b in zip(old, new, strict=True))
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.equal(model[3].weight.grad, torch.ones(3, 8))


def test_training_mode_scores_with_dropout():
    model = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 3))
    batch = (torch.randn(6, 4), torch.tensor([0, 1, 0, 1, 2, 2]))
    first, again, dropped = (
        gradient_scores(model, [batch], features=lambda output: output, training=training)["2"]
        for training in (False, False, True)
    )
    assert torch.equal(first, again) and not torch.allclose(first, dropped)


# ------------------------------------------------------------------ errors


def test_no_partners_is_an_error_with_the_remedy(build):
    batch = {"pixel_values": torch.randn(3, 1, 8, 8), "labels": torch.tensor([0, 1, 2])}
    with pytest.raises(ValueError, match="Every gradient is zero(.|\n)*TwoViewCollator"):
        gradient_scores(build("vit"), [batch])


def test_unreached_layers_are_named(build):
    features = lambda output: output.hidden_states[1][:, 0]  # noqa: E731
    model = build("vit")
    model.config.output_hidden_states = True
    with pytest.warns(UserWarning, match=r"no gradient for \d+ layers, such as 'vit.layers.1"):
        scores = gradient_scores(model, batches_for("vit", 1), features=features)
    assert scores.keys() == weights_of(model).keys()


def test_targets_that_match_nothing_are_named(build):
    with pytest.raises(ValueError, match="target_modules=.*nothing"):
        gradient_scores(build("vit"), batches_for("vit"), config=NeuroAdaConfig(target_modules=["nothing"]))


def test_max_batches_stops_early(build):
    expected = gradient_scores(build("vit"), batches_for("vit")[:2])
    scores = gradient_scores(build("vit"), batches_for("vit"), max_batches=2)
    assert all(torch.equal(scores[key], expected[key]) for key in expected)
