"""Wrong arguments of the scoring functions are named, with their value and a remedy, and leave the model as it was."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch.utils.data import TensorDataset

from peft_ext import GPSConfig, SupervisedContrastiveLoss, TwoViewCollator, activation_scores, gps, gradient_scores


X, LABELS = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])


def _model():
    return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))


def _refused(words, call):
    with pytest.raises(ValueError) as error:
        call()
    missing = [word for word in words if word not in str(error.value)]
    assert not missing, str(error.value)


SHARED = [
    ({"model": "bert"}, ["model='bert'", "torch.nn.Module"]),
    ({"dataloader": None}, ["dataloader=None", "DataLoader"]),
    ({"dataloader": "train"}, ["dataloader='train'", "DataLoader"]),
    ({"dataloader": TensorDataset(X, LABELS)}, ["dataloader=", "DataLoader"]),
    ({"dataloader": [{"x": [1, 2], "labels": [0, 1]}]}, ["dataloader", "as tensors", "DataLoader"]),
    ({"dataloader": [("a", "b")]}, ["dataloader", "('a', 'b')", "as tensors"]),
    ({"dataloader": []}, ["dataloader has no batches"]),
    ({"config": {"k": 1}}, ["config={'k': 1}", "GPSConfig"]),
    ({"config": LoraConfig()}, ["config=LoraConfig", "GPSConfig"]),
    ({"max_batches": 0}, ["max_batches=0", "at least 1", "None"]),
    ({"max_batches": 1.5}, ["max_batches=1.5", "whole number"]),
    ({"max_batches": True}, ["max_batches=True", "whole number"]),
    ({"progress": "no"}, ["progress='no'", "True or False"]),
]
GRADIENT = [
    ({"dataloader": [X]}, ["no labels", "'labels'", "pairs"]),
    ({"dataloader": [(X, [0, 1, 0, 1])]}, ["labels", "[0, 1, 0, 1]", "tensors"]),
    ({"dataloader": [(X, LABELS.float())]}, ["labels are torch.float32", "whole numbers", "'model'"]),
    ({"dataloader": [(X, LABELS[:2])]}, ["(4, 3)", "(2,)", "[samples, size] and [samples]"]),
    ({"loss": 3}, ["loss=3", "function", "'model'"]),
    ({"loss": "ce"}, ["loss='ce'", "function", "'model'"]),
    ({"loss": "model"}, ["loss='model'", "no loss", "'labels'"]),
    ({"loss": lambda x, y: x}, ["shape (4, 3)", "`loss` must return one number"]),
    ({"loss": lambda x, y: 1.0}, ["1.0", "`loss` must return one number"]),
    ({"loss": lambda x, y: x.detach().sum()}, ["depends on no weight", "detach"]),
    ({"loss": lambda x, y: x.sum() * torch.nan}, ["batch 0 is nan"]),
    ({"dataloader": [(X, torch.full((4,), -100))] * 2}, ["Every label is -100", "without one", "`loss`"]),
    ({"dataloader": [(X, torch.full((4,), 3))] * 2}, ["Every label is 3", "several classes", "`loss`"]),
    ({"dataloader": [(X, torch.tensor([5, -100, 5, -100]))]}, ["Every label is 5", "several classes"]),
    ({"features": 3}, ["features=3", "name of a module"]),
    ({"features": "body"}, ["features='body'", "name of one"]),
    ({"features": lambda output: None}, ["features=None", "tensors"]),
    ({"absolute": 1}, ["absolute=1", "True or False"]),
    ({"training": "yes"}, ["training='yes'", "True or False"]),
    ({"offload": None}, ["offload=None", "folder", "True", "False"]),
    ({"offload": 1}, ["offload=1", "folder"]),
    ({"offload": "nowhere"}, ["offload='nowhere'", "existing"]),
    ({"offload": Path("nowhere")}, ["nowhere", "existing"]),
]


@pytest.mark.parametrize(("options", "words"), [*SHARED, *GRADIENT])
def test_gradient_scores_name_what_is_wrong(options, words):
    model = _model()
    arguments = {"model": model, "dataloader": [(X, LABELS)], "features": lambda output: output} | options
    _refused(words, lambda: gradient_scores(**arguments))
    assert all(p.requires_grad and p.grad is None and not p._post_accumulate_grad_hooks for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "words"), [*SHARED, ({"anchor": 3}, ["anchor=3", "DataLoader"]), ({"anchor": []}, ["no batches"])]
)
def test_activation_scores_name_what_is_wrong(options, words):
    _refused(words, lambda: activation_scores(**{"model": _model(), "dataloader": [X]} | options))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: gps(_model(), LoraConfig(), [(X, LABELS)]), ["config=LoraConfig", "GPSConfig"]),
        (lambda: gps(_model(), GPSConfig(selection="random"), [(X, LABELS)]), ["'random'", "get_peft_model"]),
        (lambda: gps("vit", GPSConfig(), [(X, LABELS)]), ["model='vit'", "torch.nn.Module"]),
        (lambda: TwoViewCollator(None), ["augment=None", "function"]),
        (lambda: TwoViewCollator(abs, collate=1), ["collate=1", "function"]),
        (lambda: SupervisedContrastiveLoss(True), ["temperature=True", "positive"]),
        (lambda: SupervisedContrastiveLoss("0.1"), ["temperature='0.1'", "positive"]),
        (lambda: SupervisedContrastiveLoss(normalize=1), ["normalize=1", "True or False"]),
        (lambda: GPSConfig().with_scores([X]), ["scores=", "mapping"]),
    ],
)
def test_other_functions_name_what_is_wrong(call, words):
    _refused(words, call)


def test_batches_of_one_class_each_tell_classes_apart_together():
    batches = [(X, torch.full((4,), label)) for label in (0, 1)]
    scores = gradient_scores(_model(), batches, features=lambda output: output)
    assert all(score.any() for score in scores.values())


def test_batches_without_labels_are_the_cause_of_a_loss_that_is_not_finite(tiny, inputs_of):
    batch = {**inputs_of("bert"), "labels": torch.full((3,), -100)}
    _refused(
        ["batch 0 is nan", "-100", "leave the batch out"], lambda: gradient_scores(tiny("bert"), [batch], "model")
    )
    batch = inputs_of("gpt2")
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:, 1:] = -100
    _refused(["batch 0 is nan", "first tokens"], lambda: gradient_scores(tiny("gpt2"), [batch], "model"))


def test_a_folder_may_be_a_path(tmp_path):
    options = {"features": lambda output: output}
    expected = gradient_scores(_model(), [(X, LABELS)], **options)
    scores = gradient_scores(_model(), [(X, LABELS)], **options, offload=tmp_path)
    assert scores.keys() == expected.keys() and not list(tmp_path.iterdir())


def test_offloading_from_the_cpu_to_the_cpu_says_that_it_saves_nothing():
    with pytest.warns(UserWarning, match="saves nothing(.|\n)*name of a folder"):
        gradient_scores(_model(), [(X, LABELS)], features=lambda output: output, offload=True)
