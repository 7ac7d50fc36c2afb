"""Models with adapters of PEFT's SHiRA and Super-Tuning."""

import pytest
import torch
from peft import ShiraConfig, SupertuningConfig, get_peft_model


def diagonal(base_layer, r, **kwargs):
    """A mask of r * (rows + fan_in) entries, as many in each row."""
    rows, fan_in = base_layer.weight.shape
    each, rest = divmod(r * (rows + fan_in), rows)
    assert rest == 0
    mask = torch.zeros_like(base_layer.weight)
    for row in range(rows):
        mask[row, (row + torch.arange(each)) % fan_in] = 1
    return mask


def with_mask(config):
    config.mask_fn = diagonal
    return config


CONFIGS = {
    "SHiRA": lambda: ShiraConfig(r=2, random_seed=3, target_modules=["q_proj", "down_proj"], init_weights=False),
    "SHiRA of equal rows": lambda: with_mask(
        ShiraConfig(r=1, mask_type="custom", target_modules=["q_proj", "v_proj"], init_weights=False)
    ),
    "Super-Tuning": lambda: SupertuningConfig(sparsity=0.95, target_modules="all-linear", init_weights=False),
    "Super-Tuning from below": lambda: SupertuningConfig(
        sparsity=0.9, select_top=False, target_modules=["up_proj"], init_weights=False
    ),
}
PEERS = pytest.mark.parametrize("peer", CONFIGS)


def peft_adapted(base, peer="SHiRA", **options):
    """A model with an adapter of a peer, with values."""
    torch.manual_seed(0)
    config = CONFIGS[peer]()
    for name, value in options.items():
        setattr(config, name, value)
    return scaled(get_peft_model(base, config).eval())


def scaled(model):
    for name, parameter in model.named_parameters():
        if "shira_weight" in name or "supertuning_values" in name:
            parameter.data.mul_(0.1)
    return model


def dense_updates(model):
    """The update of each adapted weight, by the name that it has in the base model."""
    return {
        name: module.get_delta_weight("default").detach().to_dense().clone()
        for name, module in model.get_base_model().named_modules()
        if hasattr(module, "get_delta_weight") and "default" in module._get_available_adapters()
    }
