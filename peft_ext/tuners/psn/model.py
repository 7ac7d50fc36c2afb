"""PSN on a model."""

from __future__ import annotations

from typing import ClassVar

from ...sparse.choose.targets import ALL_NEURONS
from ...sparse.layers import LayerTypes
from ...sparse.model.sparse_model import SparseModel
from .layer import LAYERS, PSNLayer


class PSNModel(SparseModel):
    """
    PSN on a model: the `K` entries of largest magnitude in each row of `W` are trained, and all others keep their
    value.

    Paper: Zhang et al., [Proactive Gradient Conflict Mitigation in Multi-Task Learning: A Sparse Training
    Perspective](https://arxiv.org/abs/2411.18615). `get_peft_model(model, PSNConfig(...))` builds this class.

    Args:
        model (`torch.nn.Module`):
            The model to adapt.
        config ([`PSNConfig`]):
            Options of the adapter.
        adapter_name (`str`):
            Name of the adapter, `"default"` by default.
        low_cpu_mem_usage (`bool`, *optional*, defaults to `False`):
            Create an empty adapter that is loaded later. No entries are selected then.

    Attributes:
        model (`torch.nn.Module`):
            The adapted model.
        peft_config (`dict[str, PSNConfig]`):
            Options of each adapter.
    """

    prefix: str = "psn_"
    layer_types: ClassVar[LayerTypes] = LAYERS
    tuner_layer_cls = PSNLayer
    default_targets: ClassVar[str] = ALL_NEURONS
