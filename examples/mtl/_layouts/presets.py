"""The settings that the thesis trains each data set with (chapter 6, appendix D.4)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """
    Attributes:
        batch_size, epochs: of one training.
        sparse_rate, full_rate: learning rates with a sparse and with a fully trained encoder.
        density: trained share of the encoder's entries for joint training (table 17).
    """

    batch_size: int
    epochs: int
    sparse_rate: float
    full_rate: float
    density: float


# Pretrained SAM, Swin and ViT; the numbers of epochs of Clevr and SmallNORB are ours, the thesis has none.
PRESETS = {
    "nyuv2": Preset(batch_size=3, epochs=200, sparse_rate=2e-4, full_rate=5e-5, density=0.31),
    "cityscapes": Preset(batch_size=8, epochs=200, sparse_rate=1e-4, full_rate=1e-4, density=0.76),
    "celeba": Preset(batch_size=256, epochs=30, sparse_rate=2e-4, full_rate=5e-5, density=0.376),
    "clevr": Preset(batch_size=128, epochs=100, sparse_rate=2e-4, full_rate=5e-5, density=0.294),
    "smallnorb": Preset(batch_size=128, epochs=100, sparse_rate=2e-4, full_rate=5e-5, density=0.294),
}
METHOD_OPTIONS = {"cagrad": {"c": 0.4}}
