"""NeuroAda on a model."""

from __future__ import annotations

from ...sparse.model.sparse_model import SparseModel


class NeuroAdaModel(SparseModel):
    """
    NeuroAda: y = W x + (P ⊙ Θ) x + b with Θ trained at the k largest |w| of each row of W (thesis eq. 5.4).

    Args:
        model (`torch.nn.Module`): the model to adapt.
        config ([`NeuroAdaConfig`]): its options.
        adapter_name (`str`): name of the adapter, `"default"` by default.
        low_cpu_mem_usage (`bool`, *optional*, defaults to `False`):
            Create the adapter empty, to be loaded; entries are then not chosen.

    Attributes:
        model (`torch.nn.Module`): the adapted model.
        peft_config (`dict[str, NeuroAdaConfig]`): the options of each adapter.
    """

    prefix: str = "neuroada_"


NeuroAdaLinear = NeuroAdaModel.layer_types.linear
NeuroAdaConv = NeuroAdaModel.layer_types.conv
NeuroAdaMultiheadAttention = NeuroAdaModel.layer_types.attention
