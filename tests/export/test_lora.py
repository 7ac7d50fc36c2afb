"""`peft-ext export --to lora`: exact where it says so, with the error measured where it does not."""

import json

import pytest
import torch
from peft import PeftModel

from peft_ext import NeuroAdaConfig, cli
from peft_ext.export.lora import export_lora
from tests.export._common import loaded_base, saved_adapter, saved_base


CASES = {
    "llama": NeuroAdaConfig(k=1),
    "gpt2": NeuroAdaConfig(k=2),
    "bert": NeuroAdaConfig(k=1, selection="magnitude_network", modules_to_save=["classifier"], task_type="SEQ_CLS"),
}


def deltas(model):
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight") and "default" in module._get_available_adapters()
    }


def both(tmp_path, name, config, **options):
    base = saved_base(tmp_path / "base", name)
    adapter = saved_adapter(tmp_path / "adapter", base, name, config)
    found = export_lora(adapter, tmp_path / "lora", **options)
    ours, lora = (
        PeftModel.from_pretrained(loaded_base(base, name), tmp_path / folder) for folder in ("adapter", "lora")
    )
    return found, ours.eval(), lora.eval()


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set")
@pytest.mark.parametrize("name", CASES)
def test_exact_where_the_rank_suffices(name, tmp_path):
    found, ours, lora = both(tmp_path, name, CASES[name])
    assert not found.errors and found.error == 0.0
    assert found.rank == max(found.exact_ranks.values())
    expected, actual = deltas(ours), deltas(lora)
    assert expected.keys() == actual.keys()
    for module, delta in expected.items():
        torch.testing.assert_close(actual[module], delta, rtol=0, atol=0)
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        torch.testing.assert_close(lora(ids).logits, ours(ids).logits, atol=1e-5, rtol=1e-5)


def test_the_error_is_measured_where_it_does_not(tmp_path):
    found, ours, lora = both(tmp_path, "llama", NeuroAdaConfig(k=3), rank=4)
    assert found.rank == 4 and found.errors
    expected, actual = deltas(ours), deltas(lora)
    lost = total = 0.0
    for module, delta in expected.items():
        difference = float((actual[module] - delta).norm())
        best = float(torch.linalg.svdvals(delta)[4:].norm())
        assert difference == pytest.approx(best, rel=1e-4)
        assert found.errors[module] == pytest.approx(difference / float(delta.norm()), rel=1e-4)
        lost, total = lost + difference**2, total + float(delta.norm()) ** 2
    assert found.error == pytest.approx((lost / total) ** 0.5, rel=1e-4)


def test_convolutions_and_biases(tmp_path):
    config = NeuroAdaConfig(k=1, target_modules=["patch_embedding", "q_proj"], train_bias=True)
    _, ours, lora = both(tmp_path, "siglip", config, biases="lora_bias")
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(lora(pixels)[0], ours(pixels)[0], atol=1e-5, rtol=1e-5)


def test_fused_experts_and_attentions_are_refused(tmp_path):
    base = saved_base(tmp_path / "base", "mixtral")
    adapter = saved_adapter(tmp_path / "adapter", base, "mixtral", NeuroAdaConfig(k=1))
    with pytest.raises(ValueError, match=r"experts\.down_proj' is a weight of fused experts"):
        export_lora(adapter, tmp_path / "lora")
    base = saved_base(tmp_path / "siglip", "siglip")
    adapter = saved_adapter(tmp_path / "heads", base, "siglip", NeuroAdaConfig(k=1, target_modules="all-neurons"))
    with pytest.raises(ValueError, match="a projection of nn.MultiheadAttention"):
        export_lora(adapter, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_command(tmp_path, capsys):
    base = saved_base(tmp_path / "base", "gpt2")
    adapter = saved_adapter(tmp_path / "adapter", base, "gpt2", NeuroAdaConfig(k=1, train_bias=True))
    arguments = ["export", str(adapter), str(tmp_path / "lora"), "--to", "lora"]
    assert cli.main(arguments) == 1
    assert "biases of 8 modules" in capsys.readouterr().err and not (tmp_path / "lora").exists()
    assert cli.main([*arguments, "--biases", "drop", "--rank", "2"]) == 0
    printed = capsys.readouterr().out
    assert "not exact" in printed and "% of their norm" in printed and "left out" in printed
    assert cli.main([*arguments[:2], str(tmp_path / "again"), *arguments[3:], "--biases", "drop", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["errors"] == {}
    assert cli.main([*arguments[:2], str(tmp_path / "none"), *arguments[3:], "--rank", "0"]) == 1
    assert "rank=0" in capsys.readouterr().err
