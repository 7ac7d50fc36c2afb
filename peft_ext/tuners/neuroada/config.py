"""Options of NeuroAda."""

from __future__ import annotations

from dataclasses import dataclass

from ...hf.registration import peft_type
from ...sparse.config import SparseConfig


NEUROADA = peft_type("neuroada")


@dataclass
class NeuroAdaConfig(SparseConfig):
    """
    Configuration of [`NeuroAdaModel`]. NeuroAda adds a zero-initialised bypass to each neuron's `k` inputs of largest
    magnitude and keeps the base model frozen.

    Paper: Zhang et al., [NeuroAda: Activating Each Neuron's Potential for Parameter-Efficient
    Fine-Tuning](https://arxiv.org/abs/2510.18940). The defaults are the paper's. `NEUROADA_PRESETS` holds learning
    rates, batch sizes and schedules per task.

    Args:
        k (`int`, *optional*, defaults to 1):
            Number of trained entries per neuron. A neuron is a row of an `nn.Linear` weight, a column of a
            transformers `Conv1D` weight, or an output channel of a convolution. A neuron with fewer than `k` inputs
            trains all of them. With a `_layer` or `_network` selection, the same total budget is distributed across
            the layer or network.
        k_pattern (`dict[str, int]`, *optional*):
            `k` of some modules, by the ends of their names or regular expressions, as LoRA's `rank_pattern`:
            `{"down_proj": 4, r"layers\\.0\\..*": 1}`. The first that fits is taken.
        target_modules (`list[str]` or `str`, *optional*):
            Modules to adapt: a list of names, matched by suffix, or a regular expression. `"all-linear"` adapts every
            linear layer. `"all-neurons"` also adapts convolutions and `nn.MultiheadAttention`. By default, all linear
            layers of a transformers model are adapted, without its output layer and task head. Fused experts of a
            mixture of experts count as linear layers: `"experts"` names all of them, `"gate_up_proj"` or `"down_proj"`
            one layer of each. MoE routers that return several tensors are skipped unless you name them explicitly.
            Layers whose weight the model reads without calling them (`conv1d` and `dt_proj` of Mamba), or whose weight
            is computed by a parametrization, are left out, and naming them is an error.
        exclude_modules (`list[str]` or `str`, *optional*):
            Modules to leave out: a list of names, matched by suffix, or a regular expression.
        selection (`str`, *optional*, defaults to `"magnitude"`):
            How the trained entries of a neuron are selected: largest magnitude first (`"magnitude"`), smallest
            magnitude first (`"reverse"`), at random (`"random"`), or by scores that you pass to `with_scores`:
            `"gradient"` (from [`gradient_scores`]) or `"activation"` (from [`activation_scores`]). Append `_layer` or
            `_network`, as in `"magnitude_network"`, to select over a whole weight or over the whole model instead.
        neuron_ratio (`float`, *optional*, defaults to 1.0):
            Share of the neurons of each weight that get trained entries. The neurons are drawn at random.
        column_budget (`int`, *optional*):
            Number of inputs of a weight that all its neurons choose among: those with the largest sum of magnitudes
            (or scores). The update then has at most this rank, and `peft-ext export --to lora` converts it to an exact
            LoRA. Needs a selection per neuron. By default all inputs.
        seed (`int`, *optional*, defaults to 0):
            Seed of the random choices. Each module has a random stream of its own.
        backend (`str`, *optional*, defaults to `"auto"`):
            How an adapted layer computes its output. `"bypass"` adds the sparse product to the output of the base
            layer and works with any base layer. `"folded"` adds the values to the weight while the product runs, which
            rounds them to the weight's dtype. `"dense"` composes the changed weight for each product. `"reference"` is
            plain PyTorch. `"auto"` chooses by measured crossovers.
        values_dtype (`str`, *optional*):
            Dtype of the trained values: `"float32"`, `"bfloat16"` or `"float16"`. By default it is the dtype of the
            base weight, raised to float32 by PEFT's `autocast_adapter_dtype=True`.
        bias (`str`, *optional*, defaults to `"none"`):
            Which biases of the base model to train: `"none"`, `"all"`, or `"neuroada_only"` for those of the adapted
            layers. Training them changes the base model itself, as in PEFT's other methods. `train_bias` does not.
        train_bias (`bool`, *optional*, defaults to `False`):
            Whether to train the biases of the adapted layers as part of the adapter. They are then switched, disabled,
            saved and merged with it.
        init_weights (`bool`, *optional*, defaults to `True`):
            Whether the values start at zero, so that the adapted model first equals the base model. `False` draws
            random values; use it in tests.
        modules_to_save (`list[str]`, *optional*):
            Modules that are trained and saved whole, such as a new head.
        layers_to_transform (`list[int]` or `int`, *optional*):
            Numbers of the blocks to adapt, as in PEFT. By default all of them.
        layers_pattern (`list[str]` or `str`, *optional*):
            Name of the list of blocks that `layers_to_transform` counts, as in PEFT.
        trainable_token_indices (`list[int]` or `dict[str, list[int]]`, *optional*):
            Tokens whose embeddings are trained too, as in PEFT.
        target_parameters (`list[str]`, *optional*):
            Weights of fused experts to adapt, named as in PEFT: `["experts.gate_up_proj"]`. Without `target_modules`
            nothing else is adapted.
        experts_to_transform (`list[int]` or `dict[str, list[int]]`, *optional*):
            Numbers of the experts to adapt, in every module of fused experts or by module name. By default all.
            [`busiest_experts`] finds those that the data is routed to most.
        expert_weights (`list[str]`, *optional*):
            Weights of fused experts that are adapted. Filled in.
        support_sizes (`dict[str, int]`, *optional*):
            Number of trained entries per module. It is filled in where the other options do not determine it: after
            network-wide selections, `add_weighted_adapter` and [`convert`].
        peft_ext_version (`str`, *optional*):
            Version of peft_ext that wrote the adapter. Filled in when a config is saved.
        requires (`str`, *optional*):
            Package needed to load the adapter. Filled in.

    Example:

        ```py
        >>> from peft import get_peft_model
        >>> from peft_ext import NeuroAdaConfig

        >>> model = get_peft_model(model, NeuroAdaConfig(k=1))
        ```
    """

    def __post_init__(self) -> None:
        self.peft_type = NEUROADA
        super().__post_init__()
