"""Every name that PEFT does not document as public, imported here and nowhere else.

When PEFT renames one of them, this file is where it shows and where it is mended.
"""

from peft import mapping
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _ExcludedModule,
    _filter_state_dict_by_key_prefixes,
    _get_in_out_features,
    _get_tuner_state_dict_key_prefixes,
    _maybe_include_all_linear_layers,
    check_adapters_to_merge,
    check_target_module_exists,
    onload_layer,
)
from peft.utils import (
    INCLUDE_LINEAR_LAYERS_SHORTHAND,
    get_quantization_kwargs,
    load_peft_weights,
    quantization_extra_repr,
    resolve_quantization_backend,
)
from peft.utils.merge_utils import calculate_majority_sign_mask, disjoint_merge, prune
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, get_pattern_key
from peft.utils.peft_types import PeftType, register_peft_method
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend, QuantizationBackend


adapter_key_prefixes = _get_tuner_state_dict_key_prefixes
filter_by_key_prefixes = _filter_state_dict_by_key_prefixes
ExcludedModule = _ExcludedModule
in_out_features = _get_in_out_features
resolve_all_linear = _maybe_include_all_linear_layers

__all__ = [
    "INCLUDE_LINEAR_LAYERS_SHORTHAND",
    "AuxiliaryTrainingWrapper",
    "BaseTuner",
    "BaseTunerLayer",
    "ExcludedModule",
    "ForwardOnlyQuantizationBackend",
    "ModulesToSaveWrapper",
    "PeftType",
    "QuantizationBackend",
    "adapter_key_prefixes",
    "calculate_majority_sign_mask",
    "check_adapters_to_merge",
    "check_target_module_exists",
    "disjoint_merge",
    "filter_by_key_prefixes",
    "get_pattern_key",
    "get_quantization_kwargs",
    "in_out_features",
    "load_peft_weights",
    "mapping",
    "onload_layer",
    "prune",
    "quantization_extra_repr",
    "register_peft_method",
    "resolve_all_linear",
    "resolve_quantization_backend",
]
