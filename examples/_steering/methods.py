"""Ways to adapt a LLaVA, by name, and the learning rate that each is trained with by default."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from peft import IA3Config, LoraConfig, OFTConfig, get_peft_model

from peft_ext import MoReSConfig, NeuroAdaConfig


# The seven linear layers of the text model's blocks, whatever the family; not the vision tower's.
TEXT_BLOCKS = r".*(language_model|text_model)\.layers\.\d+\..*"
LINEARS = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|fc1|fc2|dense"
TEXT_LINEARS = rf"{TEXT_BLOCKS}\.({LINEARS})"

# For the tiny model of the shapes world; found on its shifted task with another seed than the table's.
LEARNING_RATES = {
    "full": 1e-3,
    "lora": 1e-2,
    "ia3": 1e-1,
    "oft": 5e-3,
    "mores": 1e-2,
    "connector": 2e-2,
    "projector": 1e-2,  # that of mores, for the comparison of the two
    "neuroada": 5e-3,
}
_NAME = re.compile(
    r"(?P<kind>full|ia3|projector)|(?P<sized>lora|oft|connector|neuroada)(-(?P<size>[1-9]\d*))?"
    r"|mores(-(?P<rank>[1-9]\d*))?(@(?P<percent>[1-9]\d?|100))?(\+)?"
)


@dataclass(frozen=True)
class Method:
    """
    One way to adapt.

    Args:
        name (`str`): as given: `full`, `lora-8`, `ia3`, `oft-8`, `neuroada-1`, `mores-2@25` (rank 2, a quarter of the
            visual tokens), `mores-2@25+` (the connector is trained too, as in the published recipe), `connector-4`
            (MoReS of rank 4 at the connector's output), `projector` (the connector is trained and nothing else).
    """

    name: str
    kind: str
    size: int
    percent: int

    @classmethod
    def parse(cls, name: str) -> Method:
        match = _NAME.fullmatch(name)
        if match is None:
            raise ValueError(
                f"method={name!r} is not known: use full, lora-<rank>, ia3, oft-<block>, neuroada-<k>, "
                "mores-<rank>@<percent of visual tokens>, the same with a + (trains the connector too), "
                "connector-<rank> or projector"
            )
        kind = match["kind"] or match["sized"] or "mores"
        size = match["size"] or match["rank"] or {"lora": 8, "oft": 8}.get(kind, 1)
        return cls(name, kind, int(size), int(match["percent"] or 1))

    @property
    def learning_rate(self) -> float:
        return LEARNING_RATES[self.kind]

    def config(self) -> Any:
        """The PEFT configuration; `None` for methods that train the model's own parameters."""
        if self.kind in ("full", "projector"):
            return None
        if self.kind == "mores":
            return MoReSConfig(
                rank=self.size,
                token_ratio=self.percent / 100,
                token_selection=self.selection,
                connector="train" if self.name.endswith("+") else "frozen",
            )
        if self.kind == "connector":
            return MoReSConfig(rank=self.size, token_ratio=1.0, site="connector")
        if self.kind == "neuroada":
            return NeuroAdaConfig(k=self.size, target_modules=TEXT_LINEARS)
        if self.kind == "lora":
            return LoraConfig(r=self.size, lora_alpha=2 * self.size, target_modules=TEXT_LINEARS)
        if self.kind == "oft":
            return OFTConfig(r=0, oft_block_size=self.size, target_modules=TEXT_LINEARS)
        feedforward = rf"{TEXT_BLOCKS}\.(down_proj|fc2)"
        attention = rf"{TEXT_BLOCKS}\.(k_proj|v_proj)"
        return IA3Config(target_modules=f"{attention}|{feedforward}", feedforward_modules=feedforward)

    @property
    def selection(self) -> str:
        """The published recipe for one percent; evenly spread for more, as its ablation seems to do."""
        return "ends" if self.percent == 1 else "uniform"

    def adapt(self, model: Any) -> Any:
        """The model prepared for training by this method. Full training leaves the vision tower alone."""
        model.requires_grad_(False)
        if self.config() is not None:
            return get_peft_model(model, self.config())
        projector = getattr(model.model, "multi_modal_projector", None)
        if projector is None:
            raise ValueError(
                f"method={self.name!r} trains `multi_modal_projector`, which a {type(model).__name__} lacks"
            )
        projector.requires_grad_(True)
        if self.kind == "full":
            model.get_decoder().requires_grad_(True)
            model.get_output_embeddings().requires_grad_(True)
        return model


def trained_parameters(model: Any) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
