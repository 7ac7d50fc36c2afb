"""NeuroAda on a model."""

from __future__ import annotations

from typing import ClassVar

from ...sparse.layers import LayerTypes
from ...sparse.model.sparse_model import SparseModel
from .layer import LAYERS, NeuroAdaLayer


class NeuroAdaModel(SparseModel):
    """
    NeuroAda on a model: `y = W x + (P ⊙ Θ) x + b`. `P` marks the `k` inputs of largest magnitude in each row of `W`;
    only `Θ` is trained there.

    Paper: Zhang et al., [NeuroAda: Activating Each Neuron's Potential for Parameter-Efficient
    Fine-Tuning](https://arxiv.org/abs/2510.18940). `get_peft_model(model, NeuroAdaConfig(...))` builds this class.

    Args:
        model (`torch.nn.Module`):
            The model to adapt.
        config ([`NeuroAdaConfig`]):
            Options of the adapter.
        adapter_name (`str`):
            Name of the adapter, `"default"` by default.
        low_cpu_mem_usage (`bool`, *optional*, defaults to `False`):
            Create an empty adapter that is loaded later. No entries are selected then.

    Attributes:
        model (`torch.nn.Module`):
            The adapted model.
        peft_config (`dict[str, NeuroAdaConfig]`):
            Options of each adapter.
    """

    prefix: str = "neuroada_"
    layer_types: ClassVar[LayerTypes] = LAYERS
    tuner_layer_cls = NeuroAdaLayer
