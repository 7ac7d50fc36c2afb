"""GPS on a model."""

from __future__ import annotations

from typing import Any

from ...sparse.config import SparseConfig
from ...sparse.layer import SparseLinear
from ...sparse.model import HEADS, SparseModel


class GPSLinear(SparseLinear):
    """A linear layer with GPS adapters in `gps_delta`."""

    adapter_layer_names = ("gps_delta",)


class GPSModel(SparseModel):
    """
    GPS: the k entries with the largest |gradient| of each row of W are trained, the rest stays as it is (thesis
    eqs. 4.2, 4.5 and 4.6).

    Args:
        model (`torch.nn.Module`): the model to adapt.
        config ([`GPSConfig`]): its options, with scores.
        adapter_name (`str`): name of the adapter, `"default"` by default.
        low_cpu_mem_usage (`bool`, *optional*, defaults to `False`):
            Create the adapter empty, to be loaded; entries are then not chosen.

    Attributes:
        model (`torch.nn.Module`): the adapted model.
        peft_config (`dict[str, GPSConfig]`): the options of each adapter.
    """

    prefix: str = "gps_"
    tuner_layer_cls = GPSLinear

    def _prepare_adapter_config(self, peft_config: SparseConfig, model_config: dict[str, Any]) -> SparseConfig:
        if peft_config.modules_to_save is None:
            heads = [name for name, _ in self.model.named_children() if name in HEADS]
            peft_config.modules_to_save = heads or None
        return super()._prepare_adapter_config(peft_config, model_config)
