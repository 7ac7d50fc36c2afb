"""Training hyperparameters of GPS per task, of the thesis (appendix B, table 3) and the published scripts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GPSPreset:
    """
    Recipe of one task for ViT-B/16 pretrained on ImageNet-21k: Adam without weight decay, cosine schedule, 10 epochs
    of linear warm-up, 224 pixels.

    Attributes:
        k (`int`):
            Trained entries per neuron that the thesis reports.
        learning_rate (`float`):
            From the published script.
        batch_size (`int`):
            From the published script.
        drop_path (`float`):
            From the published script.
        script_k (`int`, *optional*):
            Trained entries per neuron in the published script, if they differ from the thesis.
        ema_decay (`float`, *optional*):
            Decay of the moving average of the weights that the script evaluates.
        epochs (`int`):
            The same for all tasks.
        warmup_epochs (`int`):
            The same for all tasks.
    """

    k: int
    learning_rate: float
    batch_size: int
    drop_path: float = 0.0
    script_k: int | None = None
    ema_decay: float | None = None
    epochs: int = 100
    warmup_epochs: int = 10


# FGVC is trained with augmentation, mixup 0.8, cutmix 1.0 and label smoothing 0.1; VTAB-1k without any of them.
GPS_PRESETS: dict[str, GPSPreset] = {
    "fgvc/cub": GPSPreset(2, 3e-3, 32, 0.0, ema_decay=0.9998),
    "fgvc/nabirds": GPSPreset(10, 1e-4, 32, 0.1, script_k=20, ema_decay=0.9998),
    "fgvc/flowers": GPSPreset(1, 1e-3, 32, 0.1, ema_decay=0.99),
    "fgvc/cars": GPSPreset(10, 5e-4, 32, 0.0, script_k=15, ema_decay=0.9998),
    "fgvc/dogs": GPSPreset(1, 1e-4, 64, 0.0, ema_decay=0.9998),
    "vtab/caltech101": GPSPreset(1, 2e-3, 16, 0.0),
    "vtab/cifar": GPSPreset(1, 1e-2, 32, 0.0),
    "vtab/clevr_count": GPSPreset(1, 3e-4, 16, 0.1),
    "vtab/clevr_dist": GPSPreset(1, 2e-3, 16, 0.1),
    "vtab/diabetic_retinopathy": GPSPreset(1, 2e-3, 32, 0.2),
    "vtab/dmlab": GPSPreset(1, 1.5e-3, 16, 0.1),
    "vtab/dsprites_loc": GPSPreset(1, 7e-3, 32, 0.0),
    "vtab/dsprites_ori": GPSPreset(1, 5e-4, 16, 0.2),
    "vtab/dtd": GPSPreset(1, 2e-3, 16, 0.0),
    "vtab/eurosat": GPSPreset(1, 2e-3, 16, 0.0),
    "vtab/oxford_flowers102": GPSPreset(1, 2e-3, 16, 0.0),
    "vtab/kitti": GPSPreset(1, 1e-3, 16, 0.0),
    "vtab/patch_camelyon": GPSPreset(2, 4e-3, 32, 0.0),
    "vtab/oxford_iiit_pet": GPSPreset(1, 3e-3, 32, 0.0),
    "vtab/resisc45": GPSPreset(1, 1.5e-3, 16, 0.1),
    "vtab/smallnorb_azi": GPSPreset(1, 3e-3, 32, 0.1),
    "vtab/smallnorb_ele": GPSPreset(1, 3e-4, 32, 0.2),
    "vtab/sun397": GPSPreset(1, 2.5e-3, 16, 0.0),
    "vtab/svhn": GPSPreset(1, 5e-3, 32, 0.0),
}
