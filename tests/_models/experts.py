"""Tiny mixtures of experts, and the dense models that sparse updates of theirs are compared with."""

import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from peft_ext import NeuroAdaConfig
from peft_ext.sparse.layers import SparseLayer
from tests.sparse._asserts import positions


SIZES = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": 2, "pad_token_id": 0, "eos_token_id": 1,
    "bos_token_id": 1, "use_cache": False, "attn_implementation": "eager",
}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
MODELS = {
    "mixtral": {},
    "qwen3_moe": {"head_dim": 8},
    "gpt_oss": {"head_dim": 8},
    "deepseek_v3": {**LATENT, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0},
    "olmoe": {},
    "granitemoe": {},
    "llama4_text": {"head_dim": 8, "intermediate_size_mlp": 24, "interleave_moe_layer_step": 1},
}
# Whose routers, shared experts or classes of layers are of their own kind.
OTHERS = {
    "phimoe": {},
    "qwen2_moe": {"shared_expert_intermediate_size": 16},
    "jetmoe": {"kv_channels": 8},
    "falcon": {},  # no experts, but all its linear layers are of a class with a forward of its own
}
COLUMNS = ("gpt_oss", "llama4_text")  # whose neurons are columns
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")


def tiny(name="mixtral", **options):
    """A model with weights so large that experts differ."""
    wanted = {**SIZES, **EXPERTS, **(MODELS | OTHERS)[name], **options}
    known = {*AutoConfig.for_model(name).to_dict(), *AutoConfig.for_model(name).attribute_map, "attn_implementation"}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(name, **{key: value for key, value in wanted.items() if key in known})
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4 + (parameter.dim() == 1))
    return model.eval()


def token_ids(samples=2, length=6):
    return torch.randint(2, 32, (samples, length), generator=torch.Generator().manual_seed(1))


def fill(model, adapter_name="default", seed=2, scale=0.2):
    """Give an adapter values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for layer in layers_of(model).values():
        if adapter_name in layer.deltas:
            for parameter in layer.deltas[adapter_name].parameters():
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def adapted(name="mixtral", implementation=None, base=None, **options):
    """A model whose experts alone have an adapter, with values."""
    base = tiny(name) if base is None else base
    if implementation is not None and name != "llama4_text":
        base.set_experts_implementation(implementation)
    config = NeuroAdaConfig(**{"k": 2, "target_modules": ["experts"]} | options)
    return fill(get_peft_model(base, config).eval())


def layers_of(model):
    """The adapted layers by the names that their weights have in the base model."""
    return {
        module_name.removeprefix("base_model.model."): module
        for module_name, module in model.named_modules()
        if isinstance(module, SparseLayer) and module.deltas
    }


def dense_weights(name, model, base, values, adapter_name="default"):
    """
    Copies of the weights of a base model with the updates scattered into them, entry by entry.

    Args:
        values: by the name of a layer, its values, in which the weights are differentiable.
    """
    weights = {}
    for layer_name, layer in layers_of(model).items():
        if adapter_name not in layer.deltas:
            continue
        support = layer.deltas[adapter_name].support
        parameter = layer_name if "experts" in layer_name else f"{layer_name}.weight"
        weight = weights.get(parameter, base.get_parameter(parameter).detach())
        rows, columns = torch.tensor(positions(support)).unbind(1)
        if "experts" in layer_name:
            each = support.rows // len(weight)
            where = (rows // each, columns, rows % each) if name in COLUMNS else (rows // each, rows % each, columns)
        else:
            where = (rows, columns)
        weights[parameter] = weight.index_put(where, values[layer_name].reshape(-1).to(weight.dtype), accumulate=True)
    return weights


def run(model, weights=None, **inputs):
    """The logits of a model, with other weights in the place of its own."""
    if weights is None:
        return model(**inputs).logits
    return torch.func.functional_call(model, weights, (), inputs).logits
