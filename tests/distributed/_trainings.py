"""Trains and saves sparse adapters in each of several processes; run by `tests._processes.results_of`."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.fsdp as fsdp
from peft import get_peft_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainingArguments,
)

import tests.distributed._fsdp_on_cpu  # noqa: F401  # for its effect
from peft_ext import GPSConfig, NeuroAdaConfig, PSNConfig, gradient_scores
from peft_ext.sparse.layers import SparseLayer


STEPS = 4
METHODS = {
    "neuroada": lambda: NeuroAdaConfig(k=2),
    "psn": lambda: PSNConfig(density=0.3),
    "ragged": lambda: NeuroAdaConfig(k=2, selection="magnitude_network"),
    "experts": lambda: NeuroAdaConfig(k=2, target_modules=["experts", "q_proj"]),
    "gps": lambda: GPSConfig(k=1, target_modules=["q_proj", "o_proj", "down_proj"], modules_to_save=[]),
}


def base(method="neuroada"):
    """The same in every process."""
    torch.manual_seed(0)
    if method == "experts":
        config = MixtralConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=4, initializer_range=0.1, use_cache=False,
        )  # fmt: skip
        return MixtralForCausalLM(config)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.1, attention_bias=True, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def tokens():
    return torch.randint(3, 64, (32, 7), generator=torch.Generator().manual_seed(1))


def adapted(method):
    model, config = base(method), METHODS[method]()
    if method == "gps":
        batch = {"input_ids": tokens()[:4], "labels": tokens()[:4]}
        config.with_scores(gradient_scores(model, [batch], loss="model", progress=False))
    return get_peft_model(model, config)


def fsdp_options(kind, state_dict_type, method):
    if kind not in ("fsdp1", "fsdp2"):
        return {}
    config = {
        "version": int(kind[-1]),
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": ["MixtralDecoderLayer" if method == "experts" else "LlamaDecoderLayer"],
        "state_dict_type": state_dict_type,
        "cpu_ram_efficient_loading": False,
        "sync_module_states": False,
        **({"use_orig_params": True} if kind == "fsdp1" else {}),
    }
    return {"fsdp": "full_shard" if kind == "fsdp1" else True, "fsdp_config": config}


def trainer(folder, method, kind, state_dict_type="FULL_STATE_DICT", **options):
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    args = TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to=[], disable_tqdm=True,
        per_device_train_batch_size=4 // processes, train_sampling_strategy="sequential", max_steps=STEPS,
        # An epsilon so large that a gradient of nothing but rounding errors moves nothing.
        learning_rate=1e-1, adam_epsilon=1e-2, lr_scheduler_type="constant", max_grad_norm=0.0,
        **({"ddp_backend": "gloo", **fsdp_options(kind, state_dict_type, method)} if processes > 1 else {}),
        **{"save_strategy": "no", **options},
    )  # fmt: skip
    data = [{"input_ids": sample, "labels": sample} for sample in tokens()]
    return Trainer(model=adapted(method), args=args, train_dataset=data)


def full(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def train(folder, method, kind, **options):
    """Train, save, and say what came of it."""
    run = trainer(folder, method, kind, **options)
    run.train()
    run.save_model(str(folder / "saved"))
    layers = [module for module in run.model.modules() if isinstance(module, SparseLayer)]
    return {
        "sharded": any(p.numel() == 0 or hasattr(p, "to_local") for p in run.model.parameters()),
        "indices": [layer.deltas["default"].indices.clone() for layer in layers],
        "folder": str(folder / "saved"),
    }


def resume(folder, method, kind):
    """Train with a checkpoint on the way, and again from that checkpoint in a new trainer."""
    options = {"state_dict_type": "SHARDED_STATE_DICT", "save_strategy": "steps", "save_steps": 2}
    run = trainer(folder / "first", method, kind, **options)
    run.train()
    straight = values(run.model)
    again = trainer(folder / "again", method, kind, **options)
    again.train(resume_from_checkpoint=str(folder / "first" / "checkpoint-2"))
    return {"straight": straight, "resumed": values(again.model)}


def values(model):
    return {name: full(p) for name, p in model.named_parameters() if "_delta." in name}


def select(folder, method, kind):
    """Adapt a model that is sharded already."""
    model = base(method)
    if kind == "fsdp1":
        options = {"use_orig_params": True, "device_id": torch.device("cpu")}
        model.model.layers[0] = fsdp.FullyShardedDataParallel(model.model.layers[0], **options)
    else:
        for layer in model.model.layers:
            fsdp.fully_shard(layer)
    model = get_peft_model(model, METHODS[method]())
    for layer in model.modules():
        if isinstance(layer, SparseLayer):
            layer.check_base("default")  # against what the adapter was made for
    if kind == "merge":
        model.merge_adapter()
    return {"state": {name: t.clone() for name, t in model.state_dict().items() if "_delta." in name}}


def load(folder, method, kind):
    """Load a whole state dict that the first process alone has, as accelerate does, over other entries."""
    whole, model = base(), base()
    options = {"k": 2, "selection": "random", "init_weights": False}
    whole = get_peft_model(whole, NeuroAdaConfig(**options, seed=1))
    model = get_peft_model(model, NeuroAdaConfig(**options, seed=2 + dist.get_rank()))
    expected = {name: tensor.clone() for name, tensor in whole.state_dict().items() if "_delta." in name}
    for layer in model.base_model.model.model.layers:
        fsdp.fully_shard(layer)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, whole.state_dict() if dist.get_rank() == 0 else {}, options=options)
    found = {name: full(tensor) for name, tensor in model.state_dict().items() if "_delta." in name}
    return {"expected": expected, "found": found}


def main(folder, cases):
    results = []
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo")
    for number, (job, method, kind) in enumerate(cases):
        try:
            results.append(globals()[job](Path(folder) / str(number), method, kind))
        except ValueError as error:
            results.append({"error": str(error)})
    torch.save(results, os.path.join(folder, f"result{os.environ.get('RANK', '0')}.pt"))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
