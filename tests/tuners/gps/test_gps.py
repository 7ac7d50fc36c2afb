"""GPS from its scores to the adapted model, and its parameter count in the thesis."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from peft_ext import GPSConfig, gps, gradient_scores
from tests.contract._common import assert_equal_bits, fill, layers_of, logits


@pytest.fixture
def batches(inputs_of):
    """Three batches of images; every label twice in each."""
    generator = torch.Generator().manual_seed(0)
    return [
        {"pixel_values": torch.randn(6, 1, 8, 8, generator=generator), "labels": torch.tensor([0, 1, 2, 2, 1, 0])}
        for _ in range(3)
    ]


def trained(model):
    """Numbers trained by kind: entries, biases, the rest."""
    kinds = {"weight": 0, "bias": 0, "head": 0}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kinds[name.rpartition(".")[2] if "gps_delta" in name else "head"] += parameter.numel()
    return tuple(kinds.values())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (83_712, 83_712, 7_690)),  # 175,114: "0.20" in the thesis's appendix B, table 3
        ({"train_bias": False}, (83_712, 0, 7_690)),
        ({"modules_to_save": []}, (83_712, 83_712, 0)),
        ({"k": 5}, (5 * 83_712, 83_712, 7_690)),
    ],
    ids=str,
)
def test_counts_of_the_thesis(options, expected):
    with torch.device("meta"):
        base = ViTForImageClassification(ViTConfig(num_labels=10))
    scores = {
        name: module.weight for name, module in base.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))
    }
    model = get_peft_model(base, GPSConfig(**options).with_scores(scores))
    assert trained(model) == expected


def test_one_call_is_the_two_steps(tiny, batches):
    once = gps(tiny("vit"), GPSConfig(k=2), batches)
    base = tiny("vit")
    scores = gradient_scores(base, batches)
    twice = get_peft_model(base, GPSConfig(k=2).with_scores(scores))
    assert_equal_bits(once.state_dict(), twice.state_dict())
    for name, layer in layers_of(once).items():
        rows = scores[name.removeprefix("base_model.model.")].abs().flatten(1)
        chosen = rows.gather(1, layer.deltas["default"].indices.long())
        assert torch.equal(chosen.sort(1).values, rows.topk(2, dim=1).values.sort(1).values), name


def test_the_two_lines_of_the_error_work(tiny, batches):
    model, dataloader, config = tiny("vit"), batches, GPSConfig()
    with pytest.raises(ValueError) as error:
        get_peft_model(model, config)
    import peft_ext

    assert "scores = peft_ext.gradient_scores(model, dataloader)" in str(error.value)
    assert "model = get_peft_model(model, config.with_scores(scores))" in str(error.value)
    names = {"peft_ext": peft_ext, "get_peft_model": get_peft_model}
    names |= {"model": model, "dataloader": dataloader, "config": config}
    exec("\n".join(line.strip() for line in str(error.value).splitlines()[1:]), names)
    assert isinstance(names["model"], PeftModel)


@pytest.mark.parametrize("selection", ["gradient", "gradient_layer", "gradient_network"])
def test_loads_without_data(tiny, inputs_of, batches, tmp_path, selection):
    model = fill(gps(tiny("vit"), GPSConfig(k=2, selection=selection), batches)).eval()
    expected = logits(model, inputs_of("vit"))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("vit"), tmp_path)
    assert torch.equal(logits(loaded, inputs_of("vit")), expected)
    torch.testing.assert_close(logits(loaded.merge_and_unload(), inputs_of("vit")), expected, atol=1e-4, rtol=1e-4)


def test_second_adapter_scores_the_base_model(tiny, inputs_of, batches):
    alone = gps(tiny("vit"), GPSConfig(k=2), batches)
    model = fill(gps(tiny("vit"), GPSConfig(k=1), batches))
    model = gps(model, GPSConfig(k=2), batches, adapter_name="second")
    assert model.active_adapter == "default"
    for name, layer in layers_of(model).items():
        assert torch.equal(layer.deltas["second"].indices, layers_of(alone)[name].deltas["default"].indices), name


def test_blocks_are_skipped(tiny, batches):
    """Thesis fig. 4.6: entries from all blocks but one."""
    model = gps(tiny("vit"), GPSConfig(exclude_modules=r".*layers\.0\..*"), batches)
    assert layers_of(model) and not [name for name in layers_of(model) if ".layers.0." in name]
    model = gps(tiny("vit"), GPSConfig(layers_to_transform=[1]), batches)
    assert layers_of(model) and not [name for name in layers_of(model) if ".layers.1." not in name]


def test_a_causal_language_model_is_scored_by_its_own_loss(tiny, ids):
    model = tiny("llama")
    batches = [{"input_ids": ids, "labels": ids}]
    scores = gradient_scores(model, batches, progress=False)
    model.requires_grad_(True)
    model(**batches[0]).loss.backward()
    weight = model.model.layers[0].self_attn.q_proj.weight
    torch.testing.assert_close(scores["model.layers.0.self_attn.q_proj"], weight.grad)
    adapted = gps(tiny("llama"), GPSConfig(k=1, task_type="CAUSAL_LM"), batches, progress=False)
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
    assert torch.equal(layer.deltas["default"].indices[:, 0].long(), weight.grad.abs().argmax(1))
