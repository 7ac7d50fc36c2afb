"""The documentation's example of several tasks per sample trains as it is printed."""

from pathlib import Path

import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import nn


PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "multi-task.md"


class TwoTasks(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
        self.segmentation = nn.Conv2d(8, 4, 1)
        self.depth = nn.Conv2d(8, 1, 1)

    def forward(self, pixel_values):
        features = self.encoder(pixel_values)
        return {"segmentation": self.segmentation(features), "depth": self.depth(features)}


def test_example_trains_the_encoder_sparsely_and_the_heads_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = PAGE.read_text().split("## Several tasks per sample")[1].split("```python")[1].split("```")[0]
    options = 'output_dir="out", use_cpu=True, report_to="none", num_train_epochs=1, disable_tqdm=True'
    assert 'output_dir="out"' in code
    torch.manual_seed(0)
    sample = {"pixel_values": torch.randn(3, 6, 6), "labels_segmentation": torch.randint(4, (6, 6))}
    names = {"F": F, "get_peft_model": get_peft_model, "model": TwoTasks()}
    names["dataset"] = [{**sample, "labels_depth": torch.rand(1, 6, 6)} for _ in range(16)]
    exec(code.replace('output_dir="out"', options), names)
    trainer = names["trainer"]
    trained = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert sum("psn" in name for name in trained) == 2
    assert sum("modules_to_save" in name for name in trained) == 4
    assert trainer.conflicts.summary()["gradient_conflict_incidence_all"] in (0.0, 50.0, 100.0)
    assert (tmp_path / "out" / "gradient_conflicts.jsonl").exists()
