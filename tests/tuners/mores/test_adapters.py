"""Several adapters on one model: switching, disabling, deleting, saving, copying, and LoRA beside them."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

from peft_ext import MoReSConfig, hotswap_adapter
from tests._models.vision_language import IMAGE, build, inputs
from tests.tuners.mores._common import (
    adapted,
    assert_equal_bits,
    bits,
    ends,
    fill,
    layers_of,
    logits,
    steered_base,
    values_of,
)


@pytest.fixture
def batch():
    return inputs()


@pytest.fixture
def model():
    """Adapters `default` and `second`, `default` active."""
    model = adapted()
    model.add_adapter("second", MoReSConfig(rank=3, token_selection="all", layers_to_transform=[1, 2]))
    return fill(model, "second", seed=2).eval()


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_each_adapter_gives_its_own_output(model, batch):
    first = logits(model, batch)
    model.set_adapter("second")
    second = logits(model, batch)
    with steered_base(build(), values_of(model, "second"), batch["input_ids"] == IMAGE) as base:
        torch.testing.assert_close(second, logits(base, batch), atol=2e-4, rtol=1e-3)
    model.set_adapter("default")
    assert torch.equal(logits(model, batch), first) and not torch.equal(first, second)


def test_two_active_adapters_steer_one_after_the_other(model, batch):
    model.base_model.set_adapter(["default", "second"])
    both = logits(model, batch)
    for name in ("default", "second"):
        model.set_adapter(name)
        assert not torch.allclose(both, logits(model, batch), atol=1e-3)


def test_deleting_leaves_no_tensor_and_the_other_adapter(model, batch):
    model.set_adapter("second")
    expected = logits(model, batch)
    model.delete_adapter("default")
    assert not [key for key in model.state_dict() if ".default." in key]
    assert not [layer for layer in layers_of(model).values() if "default" in layer.configs]
    assert torch.equal(logits(model, batch), expected)


def test_unloading_gives_the_base_model_back(model, batch):
    keys, number = build().state_dict().keys(), hooks(build())
    base = model.unload()
    assert base.state_dict().keys() == keys and hooks(base) == number
    assert torch.equal(logits(base, batch), logits(build(), batch))
    again = get_peft_model(base, MoReSConfig())
    assert torch.equal(logits(again, batch), logits(build(), batch))


def test_a_copy_is_independent(model, batch):
    expected = logits(model, batch)
    other = copy.deepcopy(model)
    assert torch.equal(logits(other, batch), expected)
    fill(other, seed=9)
    assert torch.equal(logits(model, batch), expected) and not torch.equal(logits(other, batch), expected)
    base = other.unload()
    assert torch.equal(logits(base, batch), logits(build(), batch))
    assert torch.equal(logits(model, batch), expected)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tie_projections": False, "steering_bias": False},
        {"token_selection": "random", "seed": 5, "dropout": 0.1},
        {"site": "connector", "token_ratio": 1.0},
        {"token_positions": "f1+l2"},
        {"layers_to_transform": -1, "token_positions": "l1"},
    ],
    ids=str,
)
def test_saved_and_loaded_bit_for_bit(options, low_cpu_mem_usage, batch, tmp_path):
    model = adapted(**options)
    expected = logits(model, batch)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(again, batch), expected)
    assert_equal_bits(bits(again), bits(model))
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "adapter_config.json").read_text() == (tmp_path / "adapter_config.json").read_text()


def test_a_bf16_base_keeps_fp32_values(batch, tmp_path):
    model = adapted(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    for low in (False, True):
        again = PeftModel.from_pretrained(build(dtype=torch.bfloat16), tmp_path, low_cpu_mem_usage=low)
        assert_equal_bits(bits(again), bits(model))


def test_lora_on_the_same_base(batch):
    model = build()
    model.add_adapter(MoReSConfig(rank=2, token_ratio=0.25), "steering")
    fill(model, "steering")
    alone = logits(model, batch)
    model.add_adapter(LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False), "lora")
    model.set_adapter("steering")
    assert torch.equal(logits(model, batch), alone)
    model.set_adapter(["steering", "lora"])
    both = logits(model, batch)
    parameters = values_of(model, "steering")
    model.set_adapter("lora")
    lora = logits(model, batch)
    assert not torch.allclose(both, alone, atol=1e-3) and not torch.allclose(both, lora, atol=1e-3)
    with steered_base(model, parameters, ends(batch["input_ids"], 0.25)):
        torch.testing.assert_close(logits(model, batch), both, atol=2e-4, rtol=1e-3)


def test_injected_without_a_peft_model(batch):
    model = inject_adapter_in_model(MoReSConfig(rank=2, token_ratio=0.25), build())
    fill(model)
    state = {key: value.clone() for key, value in get_peft_model_state_dict(model).items()}
    again = inject_adapter_in_model(MoReSConfig(rank=2, token_ratio=0.25), build())
    set_peft_model_state_dict(again, state)
    assert torch.equal(logits(again, batch), logits(model, batch))
    chosen = inject_adapter_in_model(MoReSConfig(rank=2, token_ratio=0.25), build(), state_dict=state)
    assert layers_of(chosen).keys() == layers_of(model).keys()


def test_status(model):
    status = model.get_model_status()
    assert status.peft_types == {"default": "MORES", "second": "MORES"}
    assert status.available_adapters == ["default", "second"] and status.active_adapters == ["default"]
    layer = model.get_layer_status()[0]
    assert layer.module_type == "mores.MoReSLayer" and layer.name.endswith("layers.0.steering")


def test_batches_with_several_adapters_are_refused(model, batch):
    with pytest.raises(ValueError, match="adapter_names"):
        model(**batch, adapter_names=["default", "second"])


def test_merging_after_layers_is_explained_and_changes_nothing(model, batch):
    expected = logits(model, batch)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(NotImplementedError, match=r"some tokens only.*unload"):
            merge()
    assert torch.equal(logits(model, batch), expected)


def test_weighted_combination_is_explained(model):
    with pytest.raises(NotImplementedError, match="not orthonormal"):
        model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "both")


def test_swapping_in_place_is_explained_and_changes_nothing(model, batch, tmp_path):
    adapted(seed=7).save_pretrained(tmp_path)
    expected = logits(model, batch)
    with pytest.raises(ValueError, match="MORES.*load_adapter"):
        hotswap_adapter(model, tmp_path)
    assert torch.equal(logits(model, batch), expected)


class TestMergingAtTheConnector:
    @pytest.fixture
    def model(self):
        model = adapted(site="connector", token_ratio=1.0)
        model.add_adapter("second", MoReSConfig(rank=3, site="connector", token_ratio=1.0))
        return fill(model, "second", seed=2).eval()

    def linear(self, model):
        return model.get_base_model().model.multi_modal_projector.linear_2

    def test_two_adapters_merge_in_order_and_unmerge_in_any(self, model, batch):
        original = self.linear(model).weight.clone(), self.linear(model).bias.clone()
        model.base_model.set_adapter(["default", "second"])
        both = logits(model, batch)
        model.merge_adapter(["default", "second"])
        torch.testing.assert_close(logits(model, batch), both, atol=1e-4, rtol=1e-3)
        layer = next(iter(layers_of(model).values()))
        layer.unmerge(["default"])
        model.set_adapter("second")
        merged = logits(model, batch)
        model.unmerge_adapter()
        torch.testing.assert_close(merged, logits(model, batch), atol=1e-4, rtol=1e-3)
        assert torch.equal(self.linear(model).weight, original[0]) and torch.equal(
            self.linear(model).bias, original[1]
        )

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_every_bit_comes_back_after_many_rounds(self, dtype):
        model = adapted(site="connector", token_ratio=1.0, dtype=dtype)
        weight = self.linear(model).weight.clone()
        for _ in range(5):
            model.merge_adapter()
            assert not torch.equal(self.linear(model).weight, weight)
            model.unmerge_adapter()
        assert torch.equal(self.linear(model).weight, weight)

    def test_an_adapter_after_layers_beside_it_is_in_the_way_of_no_other(self, model, batch):
        expected = logits(model, batch)
        model.add_adapter("layers", MoReSConfig(rank=2))
        model.merge_adapter(["default"])
        torch.testing.assert_close(logits(model, batch), expected, atol=1e-4, rtol=1e-3)
        with pytest.raises(NotImplementedError, match="some tokens only"):
            model.merge_adapter(["second", "layers"])
        assert next(layer for layer in layers_of(model).values() if layer.merged).merged_adapters == ["default"]
        merged = model.merge_and_unload(adapter_names=["default"])
        torch.testing.assert_close(logits(merged, batch), expected, atol=1e-4, rtol=1e-3)

    def test_disabling_while_merged_gives_the_base_model(self, model, batch):
        model.merge_adapter()
        with model.disable_adapter():
            assert torch.equal(logits(model, batch), logits(build(), batch))

    def test_a_merge_that_is_not_finite_is_refused_with_nothing_written(self, model):
        layer = next(iter(layers_of(model).values()))
        layer.mores_steering["default"].weight.data[0, 0] = float("nan")
        weight = self.linear(model).weight.clone()
        with pytest.raises(ValueError, match="NaN"):
            model.merge_adapter(safe_merge=True)
        assert torch.equal(self.linear(model).weight, weight) and not layer.merged

    def test_a_bias_without_a_place_is_refused(self):
        model = adapted("idefics3", site="connector", token_ratio=1.0)
        with pytest.raises(ValueError, match="steering_bias=False"):
            model.merge_adapter()

    def test_another_adapter_around_the_layer_is_refused(self):
        base = build()
        inject_adapter_in_model(LoraConfig(target_modules=["linear_2"]), base, "lora")
        inject_adapter_in_model(MoReSConfig(site="connector", token_ratio=1.0), base, "steering")
        layer = next(iter(layers_of(base).values()))
        with pytest.raises(TypeError, match="cannot be merged"):
            layer.merge(adapter_names=["steering"])
