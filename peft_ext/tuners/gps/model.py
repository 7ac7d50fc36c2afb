"""GPS on a model."""

from __future__ import annotations

from typing import Any, ClassVar

from ...sparse.choose.heads import heads_to_save
from ...sparse.choose.targets import ALL_NEURONS
from ...sparse.config import SparseConfig
from ...sparse.layers import LayerTypes
from ...sparse.model.sparse_model import SparseModel
from .layer import LAYERS, GPSLayer


class GPSModel(SparseModel):
    """
    GPS on a model: the `k` entries with the largest |gradient| in each row of `W` are trained, and all others keep
    their value.

    Paper: Zhang et al., [Gradient-based Parameter Selection for Efficient
    Fine-Tuning](https://arxiv.org/abs/2312.10136). [`gps`] and
    `get_peft_model(model, GPSConfig(...).with_scores(scores))` build this class.

    Args:
        model (`torch.nn.Module`):
            The model to adapt.
        config ([`GPSConfig`]):
            Options of the adapter, with scores.
        adapter_name (`str`):
            Name of the adapter, `"default"` by default.
        low_cpu_mem_usage (`bool`, *optional*, defaults to `False`):
            Create an empty adapter that is loaded later. No entries are selected then.

    Attributes:
        model (`torch.nn.Module`):
            The adapted model.
        peft_config (`dict[str, GPSConfig]`):
            Options of each adapter.
    """

    prefix: str = "gps_"
    layer_types: ClassVar[LayerTypes] = LAYERS
    tuner_layer_cls = GPSLayer
    default_targets: ClassVar[str] = ALL_NEURONS

    def _prepare_adapter_config(self, peft_config: SparseConfig, model_config: dict[str, Any]) -> SparseConfig:
        if peft_config.modules_to_save is None:
            peft_config.modules_to_save = heads_to_save(self.model) or None
        return super()._prepare_adapter_config(peft_config, model_config)
