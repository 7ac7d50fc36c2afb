"""Ways to adapt a language model or a vision tower, by name."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from peft import IA3Config, LoraConfig, OFTConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..commands.method_names import matched_name
from ..tuners.mores import MoReSConfig
from ..tuners.neuroada import NeuroAdaConfig
from .connectors import Resampler


PARTS = {"vision_tower": "vision_tower", "connector": "multi_modal_projector", "language_model": "language_model"}
# Where the paper's recipe, LLaVA-1.5's, has a rate: 2e-5 for full training, 2e-4 for LoRA, here for all adapters.
LEARNING_RATES = {"full": 2e-5, "adapter": 2e-4}
_PAPER_RANKS = {"b": 1, "l": 2, "h": 4}


@dataclass(frozen=True)
class Method:
    """
    A way to adapt a language model or a vision tower. `Method.parse` makes one from a name.

    Args:
        name (`str`):
            One of these names. The numbers in them are examples.

            - `full`: all parameters.
            - `lora-8`: LoRA of rank 8, alpha 16. `lora` alone is the paper's, of rank 128.
            - `ia3`: IA3.
            - `oft`: the paper's OFT, on query, key and value, in 16 blocks. `oft-8`: all layers, in blocks of 8.
            - `bitfit`: every bias of the language model.
            - `loreft-8`: LoReFT of rank 8 on the first and the last seven tokens of the prompt.
            - `neuroada-1`: NeuroAda with `k=1`.
            - `mores-b`, `mores-l`, `mores-h`: the paper's MoReS of rank 1, 2 and 4, on all layers.
            - `mores-2@25`: MoReS of rank 2 on a quarter of the visual tokens, on all layers but the last.
            - `mores-2@25+`: the same, and the connector is trained too, as in the published code.
            - `connector-4`: MoReS of rank 4 at the output of the connector.
            - `projector`: the connector is trained, and nothing else.
        kind (`str`):
            The first part of the name, or `"peft"` for a PEFT configuration.
        size (`int`):
            The rank, block size or `k` of the name.
        percent (`int`, *optional*, defaults to 1):
            Percentage of the visual tokens that MoReS steers.
        options (`dict`, *optional*):
            A PEFT configuration as a dict, in place of a name.
    """

    name: str
    kind: str
    size: int
    percent: int = 1
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    @classmethod
    def parse(cls, name: str | dict[str, Any]) -> Method:
        """
        Make a method from its name, or from a PEFT configuration as a dict: `{"peft_type": "LORA", "r": 8}`.

        Raises:
            `ValueError`: If there is no such method.
        """
        if isinstance(name, dict):
            kind = str(name.get("peft_type", ""))
            if kind not in {key.value for key in PEFT_TYPE_TO_CONFIG_MAPPING}:
                raise ValueError(f"method={name!r} names no `peft_type` that PEFT knows.")
            return cls(kind.lower(), "peft", 0, options=dict(name))
        match = matched_name(name)
        kind = match["kind"] or match["sized"] or "mores"
        defaults = {"lora": 128, "loreft": 8, "oft": 0}
        size = match["size"] or match["rank"] or _PAPER_RANKS.get(match["letter"]) or defaults.get(kind, 1)
        return cls(name, kind, int(size), int(match["percent"] or 1))

    @property
    def learning_rate(self) -> float:
        return LEARNING_RATES["full" if self.kind == "full" else "adapter"]

    @property
    def selection(self) -> str:
        """The published recipe for one percent; evenly spread for more, as its ablation seems to do."""
        return "ends" if self.percent == 1 else "uniform"

    def config(self, model: Any, part: str = "language_model") -> Any:
        """
        The PEFT configuration; `None` for methods that train the model's own parameters.

        Args:
            model (`PreTrainedModel`): a Llava.
            part (`str`): whose layers are adapted, `language_model` or `vision_tower`.

        Raises:
            `ValueError`: if the part has no layers for the method.
        """
        if self.kind in ("full", "projector", "bitfit"):
            return None
        if self.kind in ("mores", "connector", "loreft"):
            if part != "language_model":
                raise ValueError(f"method={self.name!r} steers the language model; it can't adapt the {part}.")
            return self._steering(model)
        linears = linear_targets(model, part)
        if self.kind == "peft":
            return self._by_type(linears)
        if self.kind == "neuroada":
            return NeuroAdaConfig(k=self.size, target_modules=linears)
        if self.kind == "lora":
            return LoraConfig(r=self.size, lora_alpha=2 * self.size, target_modules=linears)
        if self.kind == "oft" and self.size:
            return OFTConfig(r=0, oft_block_size=self.size, target_modules=linears)
        if self.kind == "oft":
            queries = linear_targets(model, part, "q_proj", "k_proj", "v_proj")
            return OFTConfig(r=16, oft_block_size=0, target_modules=queries)
        down = linear_targets(model, part, "down_proj", "fc2")
        keys = linear_targets(model, part, "k_proj", "v_proj")
        return IA3Config(target_modules=f"{keys}|{down}", feedforward_modules=down)

    def _steering(self, model: Any) -> MoReSConfig:
        if self.kind == "connector":
            if isinstance(model.model.multi_modal_projector, Resampler):
                raise ValueError(
                    f"method={self.name!r} steers the connector's last linear layer, after which a resampler has a "
                    "norm; use mores-<rank>."
                )
            return MoReSConfig(rank=self.size, token_ratio=1.0, site="connector")
        if self.kind == "loreft":
            return MoReSConfig(rank=self.size, token_positions="f7+l7", layers_to_transform="all")
        return MoReSConfig(
            rank=self.size,
            token_ratio=self.percent / 100,
            token_selection=self.selection,
            layers_to_transform="all" if self.name[-1] in _PAPER_RANKS else None,
            connector="train" if self.name.endswith("+") else "frozen",
        )

    def _by_type(self, linears: str) -> Any:
        options = {key: value for key, value in self.options.items() if key != "peft_type"}
        kind = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(self.options["peft_type"])]
        if "target_modules" in kind.__dataclass_fields__:
            options.setdefault("target_modules", linears)
        return kind(**options)


def linear_targets(model: Any, part: str, *names: str) -> str:
    """
    A regular expression for the linear layers of a part's blocks, those called `names` or all.

    Raises:
        `ValueError`: if there are none.
    """
    module = model.get_submodule(f"model.{PARTS[part]}")
    known = {
        name.rsplit(".", 1)[-1]
        for name, child in module.named_modules()
        if isinstance(child, (nn.Linear, Conv1D)) and re.search(r"\.\d+\.", name)
    }
    chosen = sorted(known & set(names) if names else known)
    if not chosen:
        raise ValueError(
            f"The {part}, a {type(module).__name__}, has no linear layers called {' or '.join(names) or 'anything'} "
            f"in its blocks, but {', '.join(sorted(known))}. Pass a PEFT configuration with target_modules."
        )
    return rf".*{PARTS[part]}\..*\.\d+\..*\b({'|'.join(chosen)})"
