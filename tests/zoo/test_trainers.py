"""Every trainer with every method: the adapter learns, the base does not, and what is saved loads to the same."""

import os

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer

from ._methods import METHODS
from ._page import CELL
from ._trainers import TRAINERS, model


SAMPLE = [
    ("TRL `RLOOTrainer`", "PSN"),
    ("TRL `KTOTrainer`", "GPS"),
    ("TRL `SFTTrainer`", "MoReS"),
    ("TRL `SFTTrainer`", "NeuroAda"),
]
CASES = [(t, m) for t in TRAINERS for m in METHODS] if os.environ.get("ZOO") == "all" else SAMPLE


def adapter_of(adapted):
    """Its trained numbers."""
    return {name: p.detach().clone() for name, p in adapted.named_parameters() if p.requires_grad}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("trainer", "method"), CASES)
def test_trainer_trains_the_method(trainer, method, tmp_path, record_property):
    task_type, make = TRAINERS[trainer]
    base = model(task_type)
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    adapted = get_peft_model(base, METHODS[method](base, task_type=task_type))
    started, frozen = adapter_of(adapted), {n: p for n, p in adapted.named_parameters() if not p.requires_grad}
    kept = {name: p.detach().clone() for name, p in frozen.items()}
    run = make(tmp_path, adapted)
    run.train()
    trained = run.accelerator.unwrap_model(run.model)
    now = adapter_of(trained)
    assert now.keys() == started.keys()
    assert all(bool(p.isfinite().all()) for p in now.values())
    still = [name for name, p in now.items() if torch.equal(p, started[name])]
    assert not still
    assert all(torch.equal(p, kept[name]) for name, p in trained.named_parameters() if name in kept)

    run.save_model(tmp_path / "adapter")
    fresh = model(task_type)
    assert all(torch.equal(p, before[name]) for name, p in fresh.named_parameters())
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    ids = torch.arange(6, 14)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, trained.eval()(ids).logits)
        changed = trained(ids).logits
        with trained.disable_adapter():
            assert not torch.equal(trained(ids).logits, changed)
    assert any(isinstance(module, BaseTunerLayer) for module in loaded.modules())
    record_property(CELL, ("trainers", trainer, method, "works"))
