"""The computed problems are what they say they are, and their scripts run."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch


ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples" / "mtl"))

from _benches import BENCHES  # noqa: E402
from _benches.dense_metrics import dense_losses, depth_metrics, normal_metrics, segmentation_metrics  # noqa: E402
from _benches.runs import MASKS, Run, masked, train  # noqa: E402
from _benches.scenes import GROUND, SKY, render  # noqa: E402


@pytest.mark.parametrize("name", sorted(BENCHES))
def test_data_follow_the_seed_and_sets_differ(name):
    bench = BENCHES[name]
    first, again, other = bench.make_data(0), bench.make_data(0), bench.make_data(1)
    for a, b in zip(first, again, strict=True):
        assert all(torch.equal(a.columns[key], b.columns[key]) for key in a.columns)
    assert not torch.equal(first[0].columns["pixel_values"], other[0].columns["pixel_values"])
    images = [part.columns["pixel_values"].flatten(1).unique(dim=0) for part in first]
    assert len(torch.cat(images).unique(dim=0)) == sum(len(part) for part in images)  # the sets share none
    assert set(bench.label_names) < set(first[0].columns)


def test_scenes_fit_together():
    scene = render(20, 0)
    label, depth, normal = scene["labels_segmentation"], scene["labels_depth"], scene["labels_normal"]
    torch.testing.assert_close(normal.norm(dim=1), torch.ones(20, 24, 24))
    assert bool((depth > 0).all())
    assert len(label.unique()) == 4
    up = normal[:, 1][label == GROUND]
    torch.testing.assert_close(up, torch.ones_like(up))
    assert bool((depth[:, 0][label == SKY] == depth.max()).all())
    facing = normal[:, 2][label > GROUND]  # what is seen of a sphere does not face away from the camera
    assert float((facing < 0).float().mean()) > 0.9


@pytest.mark.parametrize("mask", MASKS)
def test_masks_train_the_heads_and_a_share_of_the_encoder(mask):
    bench = BENCHES["digits"]
    model = bench.make_model(0)
    encoder = sum(p.numel() for n, p in model.encoder.named_parameters() if n.endswith("weight"))
    heads = sum(p.numel() for p in model.heads.parameters())
    model = masked(model, mask, 0.3, 0)
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert sum(n for name, n in trained.items() if "heads" in name) == heads
    values = sum(n for name, n in trained.items() if "heads" not in name and not name.endswith("bias"))
    assert values / encoder == pytest.approx(1.0 if mask == "full" else 0.3, abs=0.02)


def test_a_run_reports_what_the_table_needs():
    result = train(BENCHES["digits"], Run("digits", "pcgrad", "psn", epochs=1))
    json.dumps(result)
    assert set(result["test"]) == set(result["validation"]) == {"upper", "lower"}
    for key in ("incidence_all", "incidence_last_half", "noise_floor"):
        assert 0 <= result[f"gradient_conflict_{key}"] <= 100


def test_dense_metrics_by_hand():
    target = torch.tensor([[[0, 0, 1, -100]]])
    logits = torch.nn.functional.one_hot(torch.tensor([[[0, 1, 1, 1]]]), 2).movedim(-1, 1).float()
    metrics = segmentation_metrics(logits, target)
    assert metrics["miou"] == pytest.approx(50.0)  # 1/2 and 1/2
    assert metrics["pixel_accuracy"] == pytest.approx(200 / 3)
    depth = torch.tensor([[[[2.0, 4.0, 0.0]]]])
    metrics = depth_metrics(torch.tensor([[[[3.0, 3.0, 9.0]]]]), depth)
    assert metrics == pytest.approx({"absolute_error": 1.0, "relative_error": 0.375})
    angles = np.radians([0.0, 20.0, 90.0])
    prediction = torch.tensor(
        np.stack([np.sin(angles), 0 * angles, np.cos(angles)])[None, :, None], dtype=torch.float32
    )
    truth = torch.tensor([0.0, 0.0, 1.0]).view(1, 3, 1, 1).expand(1, 3, 1, 3).clone()
    metrics = normal_metrics(2 * prediction, truth)
    assert metrics["mean_angle"] == pytest.approx(110 / 3, abs=1e-2)
    assert metrics["median_angle"] == pytest.approx(20.0, abs=1e-2)
    assert [metrics[f"within_{limit}"] for limit in ("11.25", "22.5", "30")] == pytest.approx(
        [100 / 3, 200 / 3, 200 / 3]
    )
    losses = dense_losses({"depth": depth + 1}, {"labels_depth": depth})
    assert float(losses["depth"]) == pytest.approx(1.0)  # the unmeasured pixel does not count


@pytest.mark.parametrize("script", ["synthetic.py", "experiment.py", "public.py", "text_tasks.py"])
def test_scripts_say_what_they_do(script, monkeypatch, capsys):
    if script == "text_tasks.py":
        pytest.importorskip("trl")
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "examples" / "mtl" / script), run_name="__main__")
    assert stop.value.code == 0
    assert f"python examples/mtl/{script}" in capsys.readouterr().out
