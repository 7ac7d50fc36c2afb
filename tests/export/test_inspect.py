"""`peft-ext inspect`."""

import json

import pytest
from peft import LoraConfig, get_peft_model

from peft_ext import NeuroAdaConfig, cli
from tests.export._common import loaded_base, saved_adapter, saved_base


def test_inspect(tmp_path, capsys):
    base = saved_base(tmp_path / "base", "llama")
    one = saved_adapter(tmp_path / "one", base, "llama", NeuroAdaConfig(k=1, target_modules=["q_proj"]), scale=1.0)
    two = saved_adapter(tmp_path / "two", base, "llama", NeuroAdaConfig(k=4, target_modules=["q_proj", "v_proj"]))
    get_peft_model(loaded_base(base, "llama"), LoraConfig()).save_pretrained(tmp_path / "lora")
    assert cli.main(["inspect", str(one), str(two), str(tmp_path / "lora")]) == 0
    printed = capsys.readouterr().out
    assert "NEUROADA, magnitude, k=1" in printed and "LORA" in printed and "shared (100.0 %)" in printed
    assert cli.main(["inspect", "--json", str(one), str(two)]) == 0
    found = json.loads(capsys.readouterr().out)
    first = found["adapters"][0]
    assert first["parameters"] == 64 and first["base"] == str(base)
    module = first["modules"][0]
    assert module["entries"] == 32 and module["share"] == pytest.approx(1 / 32)
    assert module["norm"] == pytest.approx(32**0.5, rel=0.4)
    assert found["overlaps"] == [{"adapters": [str(one), str(two)], "shared": 64, "share": 1.0}]


def test_what_is_wrong_is_named(tmp_path, capsys):
    base = saved_base(tmp_path / "base", "llama")
    adapter = saved_adapter(tmp_path / "adapter", base, "llama")
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    assert cli.main(["inspect", str(adapter)]) == 1
    assert str(path) in capsys.readouterr().err
    assert cli.main(["inspect", str(base)]) == 1
    assert "adapter_config.json" in capsys.readouterr().err
