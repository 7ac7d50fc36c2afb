"""What default targets leave out of a model."""

from __future__ import annotations

import re

from torch import nn

from peft_ext.sparse.bases.experts import bank_names
from peft_ext.sparse.choose.unsuitable import unsuitable_layers


def left_out(model: nn.Module) -> str:
    """The layers, by the ends of their names."""
    kinds: dict[str, set[str]] = {"read": set(), "parametrised": set(), "fused": set()}
    for name, reader in unsuitable_layers(model).items():
        if reader != "MultiheadAttention":  # whose parts are adapted with it
            kinds["parametrised" if reader is None else "read"].add(name.rpartition(".")[2])
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3 and re.search("expert", f"{name}.{key}") and key not in bank_names(module):
                kinds["fused"].add(key)
    return "; ".join(f"{kind}: {', '.join(f'`{n}`' for n in sorted(names))}" for kind, names in kinds.items() if names)
