"""The documentation's example of several tasks per sample trains what it says."""

from pathlib import Path

import torch

from tests.docs._world import make_hub, names_for


PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "multi-task.md"


def test_example_trains_the_encoder_sparsely_and_the_heads_whole(tmp_path, monkeypatch):
    make_hub(tmp_path)
    monkeypatch.chdir(tmp_path)
    code = PAGE.read_text().split("## Several tasks per sample")[1].split("```python")[1].split("```")[0]
    options = 'output_dir="out", use_cpu=True, report_to="none", num_train_epochs=1, disable_tqdm=True'
    assert 'output_dir="out"' in code
    torch.manual_seed(0)
    names = names_for("how-to/multi-task.md")
    exec(code.replace('output_dir="out"', options), names)
    trainer = names["trainer"]
    trained = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    heads = [name for name in trained if "modules_to_save" in name]
    assert len(heads) == 4  # weight and bias of each
    assert all("encoder" in name and "psn" in name for name in trained if name not in heads)
    assert len(trained) > len(heads)
    assert trainer.conflicts.summary()["gradient_conflict_incidence_all"] in (0.0, 100.0)
