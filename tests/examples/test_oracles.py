"""The comparison with published code: what it says without that code, and that it can tell a difference."""

import importlib

import pytest


SELECT = """
import torch
import wandb  # not installed: replaced while the file is loaded

assert wandb.run is None


def select_perCell(model, k, source, form, selectallhead, target_modules, peft_type):
    chosen = {{}}
    for name, parameter in model.named_parameters():
        if any(target in name for target in target_modules):
            values = parameter.grad if source == "gra" else parameter.data
            columns = values.abs().topk(k, dim=1, largest="reverse" not in peft_type).indices {shift}
            chosen[name] = torch.stack([torch.arange(len(values)).repeat_interleave(k), columns.flatten()], dim=1)
    return chosen
"""


@pytest.fixture
def oracles():
    return importlib.import_module("oracles")


def test_missing_code_is_named(oracles, tmp_path, capsys):
    assert oracles.main([str(tmp_path)]) == 1
    output = capsys.readouterr().out
    for repository in ("NeuroAda", "GPS", "pyreft", "FAMO", "cross-modal-information-flow-in-MLLM"):
        assert f"Left out: {repository}/" in output


@pytest.mark.parametrize(("shift", "same"), [("", True), ("* 0", False)])
def test_a_difference_in_entries_is_seen(oracles, tmp_path, shift, same):
    (tmp_path / "NeuroAda" / "utils").mkdir(parents=True)
    (tmp_path / "NeuroAda" / "utils" / "select_para.py").write_text(SELECT.format(shift=shift))
    rows = list(oracles.entries.neuroada(tmp_path))
    assert len(rows) == 5
    for row in rows:
        common, total = row.result.removesuffix(" entries in common").split(" of ")
        assert (common == total) == same
