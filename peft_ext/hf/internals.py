"""Every name that PEFT does not document as public, imported here and nowhere else.

When PEFT renames one of them, this file is where it shows and where it is mended.
"""

from peft import mapping
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    check_adapters_to_merge,
    check_target_module_exists,
    onload_layer,
)
from peft.tuners.tuners_utils import _ExcludedModule as ExcludedModule
from peft.tuners.tuners_utils import _filter_state_dict_by_key_prefixes as filter_by_key_prefixes
from peft.tuners.tuners_utils import _get_in_out_features as in_out_features
from peft.tuners.tuners_utils import _get_tuner_state_dict_key_prefixes as adapter_key_prefixes
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers as resolve_all_linear
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
