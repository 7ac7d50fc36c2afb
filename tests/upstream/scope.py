"""What of PEFT's tests is left out, and why. All that is not named here runs."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Rule:
    """Tests of a module that are left out: those whose `Class::function[parameters]` the pattern matches."""

    module: str
    pattern: str
    reason: str


# PEFT's test modules that don't run at all, without the `test_` of their name.
MODULES = {
    **{
        module: f"tests {subject} alone"
        for module, subject in {
            "adamss_asa": "AdaMSS", "adaption_prompt": "adaption prompts", "arrow": "Arrow and its experts",
            "bdlora": "BD-LoRA", "boft": "BOFT", "cartridge": "cartridges", "cpt": "CPT", "deft": "DEFT",
            "frod": "FRoD", "incremental_pca": "the PCA of EVA", "lora_ga": "LoRA-GA",
            "lora_intruders": "intruder dimensions of LoRA's factors", "lora_megatron": "LoRA on Megatron layers",
            "lora_variants": "variants of LoRA", "lorafa": "LoRA-FA", "loraplus": "LoRA+",
            "multitask_prompt_tuning": "multitask prompt tuning", "osf": "OSF", "poly": "Poly", "pvera": "PVeRA",
            "randlora": "RandLoRA", "riemannian_lora": "Riemannian LoRA", "shadow": "ShadowPEFT", "shira": "SHiRA",
            "supertuning": "Super-Tuning", "target_parameters": "`target_parameters`, which LoRA has,",
            "unilora": "UniLoRA", "vblora": "VB-LoRA", "velora": "VeLoRA", "vera": "VeRA", "xlora": "X-LoRA",
        }.items()
    },
    "common_gpu": "needs a GPU, and tests PEFT's methods by name",
    "gpu_examples": "needs a GPU, and models and data sets from the Hub",
    "gptqmodel": "needs a GPU and a GPTQ checkpoint from the Hub",
    "mixed": "tests `PeftMixedModel`, whose code lists the methods that it can mix",
    "stablediffusion": "needs Stable Diffusion and Flux pipelines from the Hub",
    "torch_compile": "needs a data set from the Hub",
    "vision_models": "needs images and models from the Hub",
}  # fmt: skip

_HUB = "needs a model, an adapter or a revision from the Hub"
_PIPELINE = "needs a Stable Diffusion pipeline from the Hub"
_EMBEDDING = "adapts an `nn.Embedding`: a look-up, without neurons that have inputs to choose from"
_MHA = "its large inputs saturate the attention: queries and keys, which PEFT packs with the values, hardly change"
_NAMES = "looks for LoRA's names of parameters, modules or types"
_DEFAULTS = "expects LoRA's default modules of an architecture; the method's default are all linear layers"
_WORDS = "expects the words of LoRA's error: the method raises one of its own"
_RANK = "bounds the error of a delta's approximation by one of low rank: a sparse delta has full rank"
_EXPERTS = "converts LoRA's configs and files to fused expert weights"
_MIXED = "uses `PeftMixedModel`, whose code lists the methods that it can mix"
_SCALING = "LoRA's scaling: the method has none"

RULES = [
    # Models and classes whose tests need a layer that is not supported
    Rule("custom_models", r"targeting_lora_to_embedding_layer|resized_embedding|repr_lora_embedding", _EMBEDDING),
    Rule("custom_models", r"lora_emb_conv1d|batches_lora_conv1d_emb", _EMBEDDING),
    Rule("custom_models", r"only_params_are_updated\[.*-MHA-", _MHA),
    Rule("custom_models", r"mixed_adapter_batches_mha_raises", "expects an error: the method mixes in attention too"),
    Rule("custom_models", r"test_mha_gradients_set_correctly", "looks for LoRA's layers inside the attention"),
    Rule("custom_models", r"requires_grad_(lora|ia3)_conv2d|repr_lora_conv2d", _NAMES),
    Rule("custom_models", r"plain_lora_and_dora.*(emb|conv2d)", "compares with DoRA, which LoRA has"),
    Rule("initialization", r"test_lora_conv2d_(default|false)", _NAMES),
    Rule("quantization", r"embed_tokens", _EMBEDDING),
    Rule(
        "quantization", r"output_similar_to_non_quantized",
        "compares random values of spread 1, which magnitudes put at other entries of a quantised weight",
    ),
    Rule("quantization", r"backend_is_set_and_repr", _DEFAULTS),
    Rule("custom_models", r"\[((True|False)-)?GPSConfig\]$", "makes GPS without scores, which is an error"),
    Rule(
        "initialization", r"mha_exposes_attributes",
        "reads `out_proj` of an adapted attention as the base's: the method has its adapted projection there",
    ),
    Rule("initialization", r"mha_with_separate_qkv_embed_raises", "expects an error: the method adapts these too"),
    Rule("initialization", r"bias_argument\[invalid\]", _WORDS),
    Rule("initialization", r"rank_not_divisible_by_groups", "the rank of LoRA's factors"),
    Rule(
        "tuners_utils", r"TiedEmbeddings::test_warn_for_tied_embeddings_merge",
        "expects a warning: a merged layer that shares its weight with an embedding gets one of its own",
    ),
    Rule(
        "custom_models", r"fsdp_wrapped_learnable_bias",
        "loads the base's biases by a config that trains none: a file may not overwrite what is frozen",
    ),
    Rule("decoder_models", r"targeting_lora_to_embedding_layer|embed_scale|fixes_tie_word_embeddings", _EMBEDDING),
    Rule("initialization", r"test_lora_\w*embedding|trainable_token_indices_targets_lora", _EMBEDDING),
    Rule("other", r"targeting_trainable_tokens_raises", _EMBEDDING),
    Rule(
        "tuners_utils", r"TestModelAndLayerStatus::.*(large|enabled_irregular$|target_parameters|injected_layers)",
        "its model is adapted in an `nn.Embedding` and an `nn.Conv2d`",
    ),
    Rule(
        "tuners_utils", r"::test_(model_)?(requires_grad|active_adapters|merged_adapters)(_model)?_irregular$",
        "its model is adapted in an `nn.Embedding` and an `nn.Conv2d`",
    ),
    # What PEFT has for LoRA only
    Rule("custom_models", r"different_scaling\[(cat|\w*svd)-", "combines LoRA's factors, by SVD or side by side"),
    Rule("custom_models", r"TestDynamicDispatch", "registers layers of one's own for LoRA"),
    Rule("config", r"TestLoraNestedConfigRoundTrip", "configs nested in LoRA's"),
    Rule("config", r"with_runtime_config", "the runtime config that LoRA has"),
    Rule("initialization", r"TestHotSwapping", "`peft.utils.hotswap` swaps LoRA alone; `peft_ext` has its own"),
    Rule("initialization", r"TestScaling::", _SCALING),
    Rule("initialization", r"TestWeightTying::test_alt_weight_tying", "`ensure_weight_tying`, an argument of LoRA"),
    Rule("initialization", r"TestLoraInitialization::.*scaling", _SCALING),
    Rule("helpers", r"TestScalingAdapters", _SCALING),
    Rule("helpers", r"TestDisableInputDtypeCasting", "the cast of inputs that LoRA makes: the method makes none"),
    Rule("integrations", r"lora_weight_conversion|qwen3_moe|mixtral_save_load", _EXPERTS),
    Rule("lora_conversion", r"converting_transformers|approximates|without_peft|multiple_adapters|float16", _RANK),
    Rule("decoder_models", r"test_lora_conversion\[\w+-config_kwargs0-.*(OPT|GPT2|GPTJ|Llama|Gemma3|qwen2)", _RANK),
    Rule("lora_conversion", r"Miss|Kasa|lora_to_lora", "tests another method alone"),
    # Names, defaults and words
    Rule("custom_models", r"TestLayerRepr|preserves_custom_requires_grad", _NAMES),
    Rule("custom_models", r"TestDefaultTargetModules::.*(model_type_set|list_of_str|modules_str)", _DEFAULTS),
    Rule("config", r"regex_with_layer_indexing_lora|lora_config_layers_to_transform_validation", _WORDS),
    Rule("initialization", r"test_lora_linear_(init_default|false)|modules_to_save_targets_lora_layer", _NAMES),
    Rule("initialization", r"test_from_pretrained_missing_keys_warning", _NAMES),
    Rule("hub_features", r"expected_tags|dont_have_transformers_tag", "expects the tag of LoRA in the model card"),
    Rule("hub_features", r"test_custom_peft_type", "gives the config LoRA's type by its name"),
    Rule("lora_conversion", r"test_targeted_modules_identical", "looks for LoKr's names of parameters"),
    Rule("initialization", r"get_peft_model(_with_task_type)?_low_cpu_mem_usage", _NAMES),
    Rule("low_level_api", r"TestLowLevelFunctional::test_(inject_adapter_in_model|modules_to_save)$", _NAMES),
    Rule("low_level_api", r"TestLowLevelFunctional::test_get_peft_model_state_dict$", _NAMES),
    Rule("low_level_api", r"missing_keys_warning|test_prefix_removal|_model_with_weight_conversion", _NAMES),
    Rule("low_level_api", r"warns_for_unsharded|named_like_peft_prefix\[", _NAMES),
    Rule("low_level_api", r"rejects_shared_state", "the method shares no state between layers"),
    Rule(
        "low_level_api", r"low_cpu_mem_usage_with_weight_conversion",
        "fills each tensor of the adapter's file with normal random numbers, and one of them holds indices",
    ),
    Rule("tuners_utils", r"module_matching_lora|realistic_example", _DEFAULTS),
    Rule("tuners_utils", r"second_adapter_with_all_linear|module_type_small|adapter_model_type", _NAMES),
    Rule("tuners_utils", r"peft_types_small|model_status_with|prefixes_(lora|select|model_with|multiple)", _NAMES),
    Rule("tuners_utils", r"nb_params_small|test_transformers_model$", "expects the number of LoRA's parameters"),
    Rule("tuners_utils", r"no_rank_nor_alpha", "reads LoRA's rank"),
    Rule("tuners_utils", r"matching_valid_(00_|02_foo|30_)", "`target_modules=[]`, which the method refuses"),
    # The Hub, and pipelines of diffusers
    Rule("config", r"cache_dir_remote", _HUB),
    Rule("decoder_models", r"gemma4|qwen3|prefix_tuning_mistral", _HUB),
    Rule("hub_features", r"TestBaseModelRevision", _HUB),
    Rule("initialization", r"test_load_checkpoint_offline|mamba|corda_conv1d_gpt2", _HUB),
    Rule("integrations", r"qwen2_5_vl", _HUB),
    Rule("other", r"get_no_split_modules_recursive", _HUB),
    Rule("tuners_utils", r"layers_diffusion", _PIPELINE),
    Rule("low_level_api", r"stable_diffusion", _PIPELINE),
    # `PeftMixedModel`
    Rule("custom_models", r"rejects_duplicate_name_without_mutation\[True\]", _MIXED),
    Rule("initialization", r"infinite_recursion.*Mixed|mixed_model_from_pretrained", _MIXED),
    Rule("tuners_utils", r"mixed_model_raises", _MIXED),
]  # fmt: skip

# Settings for every case of a module.
SETTINGS: dict[str, dict[str, object]] = {
    # The method's default are all linear layers, and the losses of these tests do not reach the pooler.
    "feature_extraction_models": {"exclude_modules": r".*pooler.*"},
}

# Tests that load an adapter onto a newly made random model, see `equal_toy_models`.
_NEW_MODELS = {
    "custom_models": r"loading_model_(with_\w+_)?requires_grad|named_sibling|scalar_modules_to_save",
    "initialization": r"TestLoadPeftKeyMapping",
    "low_level_api": r"state_dict_preserves_input",
}

# Tests that run if a config is LoRA's, although other methods can do what they test, see `as_lora`.
_FOR_LORA = {"decoder_models": r"mixed_adapter_batches", "encoder_decoder_models": r"mixed_adapter_batches"}

# What stands behind reasons that PEFT's tests give, or pytest, when they skip themselves.
REMARKS = {
    "Testing bias warnings only for LoraConfig or BOFTConfig": "PEFT asks whether a config is none of two classes, "
    "which is true of any: this test never runs",
    "got empty parameter set for (config_cls, config_kwargs)": "PEFT's rows are of prompt learning alone",
    "Combining Gemma adapters with SVD is currently failing": "PEFT leaves this model out for all methods",
    "Test does not work with model peft-internal-testing/tiny-dummy-qwen2": "PEFT leaves it out for all methods",
}


def rule_for(module: str, test: str) -> Rule | None:
    """The first rule that leaves a test out."""
    return next((rule for rule in RULES if rule.module == module and re.search(rule.pattern, test)), None)


def reloads_onto_new_model(module: str, test: str) -> bool:
    return module in _NEW_MODELS and re.search(_NEW_MODELS[module], test) is not None


def looks_for_lora(module: str, test: str) -> bool:
    return module in _FOR_LORA and re.search(_FOR_LORA[module], test) is not None
