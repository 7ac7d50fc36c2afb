"""PSN on a model."""

from __future__ import annotations

from typing import ClassVar

from ...sparse.choose.targets import ALL_NEURONS
from ...sparse.model.sparse_model import SparseModel


class PSNModel(SparseModel):
    """
    PSN: the K largest |w| of each row of W are trained, the rest stays as it is (thesis section 6.3.4).

    Args:
        model (`torch.nn.Module`): the model to adapt.
        config ([`PSNConfig`]): its options.
        adapter_name (`str`): name of the adapter, `"default"` by default.
        low_cpu_mem_usage (`bool`, *optional*, defaults to `False`):
            Create the adapter empty, to be loaded; entries are then not chosen.

    Attributes:
        model (`torch.nn.Module`): the adapted model.
        peft_config (`dict[str, PSNConfig]`): the options of each adapter.
    """

    prefix: str = "psn_"
    default_targets: ClassVar[str] = ALL_NEURONS


PSNLinear = PSNModel.layer_types.linear
PSNConv = PSNModel.layer_types.conv
