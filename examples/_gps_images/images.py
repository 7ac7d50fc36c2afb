"""A model and an image data set of one's own: load, adapt with GPS, train, evaluate, save."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer, TrainingArguments

from peft_ext import GPS_PRESETS, GPSConfig, TwoViewCollator, activation_scores, gps, selection_report


HELD_OUT = 0.2  # of the training images, where the data set has no validation split


def load(source: str, config: str | None) -> datasets.DatasetDict:
    """A folder of images by class (`train/cat/1.png`, or without `train`), or a data set of the Hub."""
    if Path(source).is_dir():
        found = datasets.load_dataset("imagefolder", data_dir=source)
    else:
        found = datasets.load_dataset(source, config)
    if "train" not in found:
        sys.exit(f"--data {source} has the splits {list(found)}; one of them must be 'train'")
    return found


def column_of(split: datasets.Dataset, kind: type) -> str:
    """The column that holds images, or labels."""
    name = next((name for name, feature in split.features.items() if isinstance(feature, kind)), None)
    if name is None:
        sys.exit(f"--data has no column of type {kind.__name__}; its columns are {split.features}")
    return name


def splits(source: str, config: str | None, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Images to train on and images to evaluate on."""
    found = load(source, config)
    held_out = next((name for name in ("validation", "val", "valid", "test") if name in found), None)
    if held_out is not None:
        return found["train"], found[held_out]
    label = column_of(found["train"], datasets.ClassLabel)
    parts = found["train"].train_test_split(HELD_OUT, seed=seed, stratify_by_column=label)
    return parts["train"], parts["test"]


def prepared(split: datasets.Dataset, processor: Any) -> datasets.Dataset:
    """Images as the model takes them, made when they are asked for."""
    image, label = column_of(split, datasets.Image), column_of(split, datasets.ClassLabel)

    def transform(rows: dict[str, list[Any]]) -> dict[str, Any]:
        pixels = processor([picture.convert("RGB") for picture in rows[image]], return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": torch.tensor(rows[label])}

    return split.with_transform(transform)


def view(example: dict[str, Any]) -> dict[str, Any]:
    """An augmented copy of an image: a random part of it, scaled up, perhaps mirrored, darker or brighter."""
    image = torch.as_tensor(example["pixel_values"])  # [3, height, width]
    height, width = image.shape[1:]
    side = float(torch.empty(()).uniform_(0.5, 1.0))
    h, w = max(1, round(side * height)), max(1, round(side * width))
    top, left = (int(torch.randint(0, size + 1, ())) for size in (height - h, width - w))
    part = image[None, :, top : top + h, left : left + w]
    image = F.interpolate(part, (height, width), mode="bilinear", align_corners=False)[0]
    if torch.rand(()) < 0.5:
        image = image.flip(2)
    return {**example, "pixel_values": image * torch.empty(()).uniform_(0.6, 1.4)}


def adapted(model: nn.Module, train: datasets.Dataset, options: argparse.Namespace) -> Any:
    """The model with GPS on it, chosen by the gradient of two views, or by activations where asked for."""
    config = GPSConfig(k=options.k, selection=options.selection, seed=options.seed)
    scope = options.selection.partition("_")[0]
    loader: Callable[..., DataLoader[Any]] = lambda **more: DataLoader(train, options.batch_size, **more)  # noqa: E731
    if scope == "activation":
        config.with_scores(activation_scores(model, loader()))
    if scope != "gradient":
        from peft import get_peft_model

        return get_peft_model(model, config)
    order = torch.Generator().manual_seed(options.seed)
    batches = loader(shuffle=True, generator=order, collate_fn=TwoViewCollator(view), drop_last=False)
    return gps(model, config, batches, offload=options.offload)


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((np.argmax(prediction.predictions, -1) == prediction.label_ids).mean())}


def run(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """
    Args:
        options (`argparse.Namespace`): Of the command line; what is `None` comes from the preset.

    Returns:
        What to print, and the content of the JSON.
    """
    preset = GPS_PRESETS[options.preset] if options.preset else None
    for name, fallback in (("k", 1), ("learning_rate", 1e-3), ("batch_size", 32), ("epochs", 20)):
        if getattr(options, name) is None:
            setattr(options, name, getattr(preset, name) if preset else fallback)
    drop_path = {"drop_path_rate": preset.drop_path} if preset and preset.drop_path else {}
    train, held_out = splits(options.data, options.data_config, options.seed)
    names = train.features[column_of(train, datasets.ClassLabel)].names
    processor = AutoImageProcessor.from_pretrained(options.model)
    torch.manual_seed(options.seed)
    model = AutoModelForImageClassification.from_pretrained(
        options.model,
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
        ignore_mismatched_sizes=True,
        **drop_path,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    train, held_out = prepared(train, processor), prepared(held_out, processor)
    model = adapted(model.to(device), train, options)
    selection_report(model).save(options.out)
    steps = options.epochs * -(-len(train) // options.batch_size)
    arguments = TrainingArguments(
        output_dir=str(options.out / "trainer"),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(0.1 * steps),
        weight_decay=0.0,  # AdamW without it is the paper's Adam
        seed=options.seed,
        use_cpu=device == "cpu",
        bf16=device == "cuda",
        remove_unused_columns=False,
        label_names=["labels"],
        save_strategy="no",
        report_to="none",
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=train, compute_metrics=accuracy)
    trainer.train()
    score = trainer.evaluate(held_out)["eval_accuracy"]
    model.save_pretrained(options.out / "adapter")
    trained, total = model.get_nb_trainable_parameters()
    content = {
        "options": {name: str(value) for name, value in vars(options).items()},
        "classes": len(names),
        "images": {"train": len(train), "held out": len(held_out)},
        "trained_parameters": trained,
        "all_parameters": total,
        "accuracy": score,
    }
    text = (
        f"GPS k={options.k} ({options.selection}), learning rate {options.learning_rate:g}, {options.epochs} epochs: "
        f"{100 * score:.1f} % of {len(held_out)} held-out images, {trained:,} trained parameters "
        f"({100 * trained / total:.2f} %)"
    )
    return text, content
