"""`peft-ext convert`."""

import os

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model

from peft_ext import NeuroAdaConfig, cli
from peft_ext.conversion import cli as command
from tests.conversion._common import peft_adapted
from tests.tuners.neuroada._common import logits


pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")


def test_command(tiny, model_dir, ids, tmp_path, capsys):
    model = peft_adapted(tiny("llama"))
    model.save_pretrained(tmp_path / "peer")
    arguments = ["convert", str(tmp_path / "peer"), str(tmp_path / "ours"), "--base", model_dir("llama")]
    assert cli.main(arguments) == 0
    assert "entries" in capsys.readouterr().out
    assert isinstance(PeftConfig.from_pretrained(tmp_path / "ours"), NeuroAdaConfig)
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids), atol=1e-5, rtol=1e-5)


def test_command_says_what_is_wrong(tiny, tmp_path, capsys):
    peft_adapted(tiny("llama")).save_pretrained(tmp_path / "peer")
    config = PeftConfig.from_pretrained(tmp_path / "peer")
    config.base_model_name_or_path = None
    config.save_pretrained(tmp_path / "peer")
    assert cli.main(["convert", str(tmp_path / "peer"), str(tmp_path / "ours")]) == 1
    assert "--base" in capsys.readouterr().err
    get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    assert cli.main(["convert", str(tmp_path / "lora"), str(tmp_path / "ours")]) == 1
    assert "LORA" in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()


def arguments(tmp_path, model_dir, out):
    return ["convert", str(tmp_path / "peer"), str(out), "--base", model_dir("llama")]


@pytest.mark.parametrize(
    ("option", "value", "remedy"),
    [("--base", "no/where/at/all", "Pass the folder or Hub id"), ("--dtype", "float7", "pass auto, float32")],
)
def test_a_base_model_that_cannot_be_loaded(tiny, model_dir, tmp_path, capsys, option, value, remedy):
    peft_adapted(tiny("llama")).save_pretrained(tmp_path / "peer")
    assert cli.main([*arguments(tmp_path, model_dir, tmp_path / "ours"), option, value]) == 1
    error = capsys.readouterr().err
    assert f"{option} {value}" in error and remedy in error
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("what", ["a file", "files", "below a file"])
def test_no_place_to_write_to(tiny, model_dir, tmp_path, capsys, monkeypatch, what):
    peft_adapted(tiny("llama")).save_pretrained(tmp_path / "peer")
    monkeypatch.setattr(command, "convert", None)  # the refusal comes before any work
    out = tmp_path / "ours"
    if what == "a file":
        out.write_text("mine")
    elif what == "files":
        out.mkdir()
        (out / "adapter_config.json").write_text("mine")
    else:
        (tmp_path / "blocking").write_text("mine")
        out = tmp_path / "blocking" / "ours"
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(arguments(tmp_path, model_dir, out)) == 1
    error = capsys.readouterr().err
    assert f"out='{out}'" in error and "pass a" in error
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("interrupted", ["while saving", "while moving", "not at all"])
@pytest.mark.parametrize("exists", [True, False])
def test_interrupted(tiny, model_dir, tmp_path, monkeypatch, interrupted, exists):
    """There is either a whole adapter in the folder, or none that PEFT would take for one."""
    peft_adapted(tiny("llama")).save_pretrained(tmp_path / "peer")
    out = tmp_path / "deep" / "ours"
    if exists:
        out.mkdir(parents=True)

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    if interrupted == "while saving":
        monkeypatch.setattr(NeuroAdaConfig, "save_pretrained", stop)
    elif interrupted == "while moving":
        replace = os.replace
        monkeypatch.setattr(os, "replace", lambda a, b: stop() if b == out / "adapter_config.json" else replace(a, b))
    if interrupted == "not at all":
        assert cli.main(arguments(tmp_path, model_dir, out)) == 0
        assert sorted(file.name for file in out.iterdir()) == [
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
        ]
        assert (out / "adapter_config.json").stat().st_mode == (
            tmp_path / "peer" / "adapter_config.json"
        ).stat().st_mode
    else:
        with pytest.raises(KeyboardInterrupt):
            cli.main(arguments(tmp_path, model_dir, out))
        assert not (out / "adapter_config.json").exists() and out.exists() == (exists or interrupted == "while moving")
    assert not list(tmp_path.rglob(".peft-ext-*"))
