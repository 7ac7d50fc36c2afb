"""State of a model before an adapter is loaded, to return to if loading fails."""

from __future__ import annotations

from typing import Any

import torch

from ..hf.internals import AuxiliaryTrainingWrapper, BaseTunerLayer


class Snapshot:
    """
    Modes, trainable parameters, biases, and which adapters were active and merged, of a `PeftModel` or another one.

    Weights are not copied: loading an adapter writes into none of the base's but biases.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.modules = set(model.modules())
        self.modes = [(module, module.training) for module in self.modules]
        self.parameters = [
            (module, name, parameter, parameter.requires_grad)
            for module in self.modules
            for name, parameter in module._parameters.items()
            if parameter is not None
        ]
        self.biases = [(p, p.detach().clone()) for _, name, p, _ in self.parameters if name.endswith("bias")]
        self.layers = [
            (layer, layer._active_adapter, layer._disable_adapters, list(layer.merged_adapters))
            for layer in self.modules
            if isinstance(layer, BaseTunerLayer)
        ]
        tuners = (model, getattr(model, "base_model", None))
        self.active = [(t, t.active_adapter) for t in tuners if t is not None and "active_adapter" in vars(t)]

    def restore(self, tuner: Any) -> None:
        """Undo a load of an adapter of `tuner`, which has been deleted from the layers that stay."""
        for name, module in list(self.model.named_modules()):
            if module in self.modules or not name:
                continue
            if isinstance(module, AuxiliaryTrainingWrapper):
                original = module.unload_and_optionally_merge_module(merge=False, safe_merge=False, adapter_names=None)
            else:
                original = tuner.replaced_by(module)
            if original is not None:
                parent, _, child = name.rpartition(".")
                setattr(self.model.get_submodule(parent), child, original)
        for module, name, parameter, trainable in self.parameters:
            if module._parameters.get(name) is not parameter:
                module._parameters[name] = parameter
            parameter.requires_grad_(trainable)
        for parameter, before in self.biases:
            # Not without need, for others may read its memory. (Of 8-bit floats torch compares no two.)
            if not parameter.is_meta and not torch.equal(parameter.double(), before.double()):
                parameter.data.copy_(before)
        for layer, active, disabled, merged in self.layers:
            layer._active_adapter, layer._disable_adapters = active, disabled
            if merged and not layer.merged_adapters:  # PEFT unmerges to activate what it has loaded
                layer.merge(adapter_names=merged)
        for one, name in self.active:
            one.active_adapter = name
        for module, training in self.modes:
            module.training = training
