"""The example of GPS on images: what each method trains, and that both of its modes run through."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gps_images
import pytest
import torch
from _gps_images import methods, models
from _quickstart import data, pretraining
from peft import PeftModel
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from peft_ext import GPS_PRESETS
from tests.contract._common import layers_of


@pytest.fixture(scope="module")
def digits() -> data.Digits:
    return data.load()


def adapted(digits: data.Digits, model: str, name: str, seed: int = 0) -> nn.Module:
    architecture = models.ARCHITECTURES[model]
    method = next(m for m in methods.methods(digits.train, architecture.linears, 1) if m.name == name)
    return method.adapt(pretraining.fresh_task(architecture.build(True), seed=0), seed)


def rows_of(model: nn.Module) -> int:
    """Neurons of the model, the head's aside."""
    layers = (nn.Linear, nn.Conv2d)
    named = (module for name, module in model.named_modules() if isinstance(module, layers) and name != "classifier")
    return sum(module.weight.shape[0] for module in named)


@pytest.mark.parametrize("name", ["gps", "gps_network", "gps_random", "neuroada"])
@pytest.mark.parametrize("model", list(models.ARCHITECTURES))
def test_sparse_methods_train_one_entry_per_neuron(digits: data.Digits, model: str, name: str) -> None:
    trained = adapted(digits, model, name)
    rows = rows_of(models.ARCHITECTURES[model].build(True))
    assert sum(layer.deltas["default"].weight.numel() for layer in layers_of(trained).values()) == rows
    per_neuron = all(layer.deltas["default"].weight.dim() == 2 for layer in layers_of(trained).values())
    assert per_neuron == (name != "gps_network")
    with_biases = all(layer.deltas["default"].bias is not None for layer in layers_of(trained).values())
    assert with_biases == (name != "neuroada")


@pytest.mark.parametrize("model", list(models.ARCHITECTURES))
def test_every_method_trains_the_classifier(digits: data.Digits, model: str) -> None:
    for method in methods.methods(digits.train, models.ARCHITECTURES[model].linears, 1):
        trained = method.adapt(pretraining.fresh_task(models.ARCHITECTURES[model].build(True), 0), 0)
        names = [name for name, p in trained.named_parameters() if p.requires_grad and "classifier" in name]
        assert len(names) == 2, method.name


def test_selection_depends_on_the_data_and_not_on_the_order_of_calls(digits: data.Digits) -> None:
    def entries(images: data.Images) -> torch.Tensor:
        model = methods.with_gps(images, "gradient", 1)(models.ARCHITECTURES["vit"].build(True), 0)
        return torch.cat([layer.deltas["default"].indices.flatten() for layer in layers_of(model).values()])

    first, again, other = entries(digits.train), entries(digits.train), entries(digits.validation)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_views_keep_the_label_and_change_the_image(digits: data.Digits) -> None:
    batch = next(iter(methods.scoring_batches(digits.train, seed=0)))
    half = len(batch["labels"]) // 2
    assert torch.equal(batch["labels"][:half], batch["labels"][half:])
    assert not torch.equal(batch["pixel_values"][:half], batch["pixel_values"][half:])


@pytest.mark.slow
def test_digits_run_through(run_script: Callable[..., tuple[str, dict[str, Any]]], tmp_path: Path) -> None:
    text, content = run_script("gps_images", "--smoke", "--models", "convnext")
    rows = {row["method"]: row for row in content["rows"]}
    assert len(rows) == 8 and all(row["label"] in text for row in rows.values())
    assert all(len(row["scores"]) == 1 for row in rows.values())
    assert (tmp_path / "out" / "convnext" / "gps" / "selection_report.png").is_file()
    report = json.loads((tmp_path / "out" / "convnext" / "gps" / "selection_report.json").read_text())
    assert sum(count["entries"] for count in report["counts"]) * 2 == rows["gps"]["adapter_parameters"]


def image_folder(folder: Path, digits: data.Digits) -> None:
    from PIL import Image

    for number in range(24):
        pixels = ((digits.train.pixel_values[number, 0] + 1) * 127).to(torch.uint8).numpy()
        label = f"digit {int(digits.train.labels[number])}"
        (folder / label).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / label / f"{number}.png")


@pytest.mark.slow
def test_own_model_and_folder_run_through(
    run_script: Callable[..., tuple[str, dict[str, Any]]], tmp_path: Path, digits: data.Digits
) -> None:
    pytest.importorskip("PIL")
    image_folder(tmp_path / "images", digits)
    config = ViTConfig(
        image_size=16, patch_size=4, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    ViTForImageClassification(config).save_pretrained(tmp_path / "model")
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 16, "width": 16},
        "do_normalize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "do_resize": True,
        "do_rescale": True,
    }
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(processor))
    text, content = run_script(
        "gps_images",
        *("--model", str(tmp_path / "model"), "--data", str(tmp_path / "images")),
        *("--preset", "vtab/svhn", "--epochs", "1", "--batch-size", "8"),
    )
    assert "learning rate 0.005" in text and content["classes"] == 5
    base = ViTForImageClassification.from_pretrained(tmp_path / "model", num_labels=5, ignore_mismatched_sizes=True)
    loaded = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter")
    assert len(layers_of(loaded)) == 13
    assert (tmp_path / "out" / "selection_report.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "x"], "--model and --data go together"),
        (["--k", "0"], "--k is 0: must be at least 1"),
        (["--preset", "vtab/nothing"], "invalid choice"),
    ],
)
def test_wrong_options_are_explained(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gps_images.arguments(arguments)
    assert words in capsys.readouterr().err


def test_presets_are_those_of_the_nineteen_and_the_five_tasks() -> None:
    assert sum(name.startswith("vtab/") for name in GPS_PRESETS) == 19
    assert sum(name.startswith("fgvc/") for name in GPS_PRESETS) == 5
    # Thesis, appendix B, table 3: one connection per neuron but for these.
    several = {name: preset.k for name, preset in GPS_PRESETS.items() if preset.k != 1}
    assert several == {"fgvc/cub": 2, "fgvc/nabirds": 10, "fgvc/cars": 10, "vtab/patch_camelyon": 2}
