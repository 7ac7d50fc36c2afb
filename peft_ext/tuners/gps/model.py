"""GPS on a model."""

from __future__ import annotations

from typing import Any, ClassVar

from ...sparse.choose.heads import heads_to_save
from ...sparse.choose.targets import ALL_NEURONS
from ...sparse.config import SparseConfig
from ...sparse.model.sparse_model import SparseModel


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
    default_targets: ClassVar[str] = ALL_NEURONS

    def _prepare_adapter_config(self, peft_config: SparseConfig, model_config: dict[str, Any]) -> SparseConfig:
        if peft_config.modules_to_save is None:
            peft_config.modules_to_save = heads_to_save(self.model) or None
        return super()._prepare_adapter_config(peft_config, model_config)


GPSLinear = GPSModel.layer_types.linear
GPSConv = GPSModel.layer_types.conv
