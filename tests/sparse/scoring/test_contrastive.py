"""The contrastive loss against sums written out sample by sample."""

import math

import pytest
import torch

from peft_ext import SupervisedContrastiveLoss, TwoViewCollator


def written_out(features, labels, temperature):
    z = [row / row.norm() for row in features]
    losses = []
    for i in range(len(z)):
        others = [j for j in range(len(z)) if j != i]
        partners = [j for j in others if labels[j] == labels[i]]
        if partners:
            total = sum((z[i] @ z[j] / temperature).exp() for j in others)
            losses.append(-sum(z[i] @ z[j] / temperature - total.log() for j in partners) / len(partners))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("labels", [[0, 1, 0, 1, 2, 0], [0, 0, 0, 0, 0, 0], [3, 1, 2, 3, 4, 5]], ids=str)
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_loss_and_gradient_are_those_of_the_published_sum(labels, temperature):
    torch.manual_seed(0)
    features = torch.randn(6, 5, requires_grad=True)
    wide = features.detach().double().requires_grad_()
    loss = SupervisedContrastiveLoss(temperature)(features, torch.tensor(labels))
    expected = written_out(wide, labels, temperature)
    torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=0)
    (gradient,), (exact,) = torch.autograd.grad(loss, features), torch.autograd.grad(expected, wide)
    torch.testing.assert_close(gradient, exact.float(), rtol=1e-4, atol=1e-5)


def test_samples_without_a_label_are_left_out():
    features = torch.randn(6, 5, requires_grad=True)
    labels, labelled = torch.tensor([0, -100, 1, -100, 0, 1]), [0, 2, 4, 5]
    loss = SupervisedContrastiveLoss()
    assert torch.equal(loss(features, labels), loss(features[labelled], labels[labelled]))
    loss(features, torch.full((6,), -100)).backward()
    assert not features.grad.any()


def test_samples_without_partners_give_a_gradient_of_zero():
    features = torch.randn(3, 4, requires_grad=True)
    SupervisedContrastiveLoss()(features, torch.tensor([0, 1, 2])).backward()
    assert torch.equal(features.grad, torch.zeros(3, 4))


def test_half_precision_features():
    features, labels = torch.randn(6, 8), torch.tensor([0, 1, 0, 1, 2, 2])
    loss = SupervisedContrastiveLoss()
    half = loss(features.bfloat16(), labels)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, loss(features.bfloat16().float(), labels))


@pytest.mark.parametrize("temperature", [0, -1.0, math.nan])
def test_temperature_must_be_positive(temperature):
    with pytest.raises(ValueError, match="temperature=.* must be positive"):
        SupervisedContrastiveLoss(temperature)


def test_other_shapes_say_where_features_come_from():
    with pytest.raises(ValueError, match=r"\(2, 3, 4\)(.|\n)*`features=`"):
        SupervisedContrastiveLoss()(torch.randn(2, 3, 4), torch.tensor([0, 1]))


def test_two_views_are_augmented_independently():
    numbers = iter(range(100))
    examples = [{"x": torch.zeros(1), "labels": label} for label in (5, 6, 7)]
    batch = TwoViewCollator(lambda example: {**example, "x": example["x"] + next(numbers)})(examples)
    assert batch["labels"].tolist() == [5, 6, 7, 5, 6, 7]
    assert batch["x"].unique().numel() == 6
    assert all(float(example["x"]) == 0 for example in examples)
