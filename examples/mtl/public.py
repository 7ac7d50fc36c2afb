"""
Multi-task training on a public data set that you have downloaded, with the thesis's settings.

    python examples/mtl/public.py --data nyuv2 --root data/nyuv2 --method cagrad --mask psn --out out/nyuv2

Layouts of --root:
  nyuv2, cityscapes   {train,val}/{image,label,depth,normal}/<number>.npy, as the authors of MTAN distribute them
                      (cityscapes: no normal; label_7 is taken where it exists)
  celeba              img_align_celeba/, list_attr_celeba.txt, list_eval_partition.txt
  clevr               images/{train,val}/, scenes/CLEVR_{train,val}_scenes.json
  smallnorb           smallnorb-*-{training,testing}-{dat,info}.mat[.gz]
The encoder is a small convolutional one from random weights, unless --encoder names a folder with a transformers
vision model (classification data sets only); images then have the size and the mean and deviation that it was trained
with.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from _benches.base import EncoderWithHeads
from _benches.dense_metrics import METRICS, dense_losses
from _benches.runs import MASKS, masked
from _benches.scenes import Decoder, Encoder
from _layouts.arrays import CityScapes, NYUv2
from _layouts.celeba import CelebA
from _layouts.clevr import Clevr
from _layouts.presets import METHOD_OPTIONS, PRESETS
from _layouts.smallnorb import SmallNORB
from torch import Tensor, nn

from peft_ext.mtl import METHODS, MTLConfig, MTLTrainer


class VisionEncoder(nn.Module):
    """A transformers vision model, down to one vector per image."""

    mean: Tensor
    std: Tensor

    def __init__(self, folder: str) -> None:
        super().__init__()
        from transformers import AutoModel

        self.model = AutoModel.from_pretrained(folder)
        self.width = self.model.config.hidden_size
        self.size = self.model.config.image_size
        processor = Path(folder) / "preprocessor_config.json"
        settings = json.loads(processor.read_text()) if processor.exists() else {}
        for name in ("mean", "std"):
            values = settings.get(f"image_{name}", [0.5, 0.5, 0.5])
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values=(pixel_values - self.mean) / self.std).last_hidden_state.mean(1)


class Pooled(nn.Module):
    """The coarsest features of the convolutional encoder, averaged over the image."""

    width = 64
    size = 64

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.encoder(pixel_values)[-1].mean((2, 3))


def load(args: argparse.Namespace, size: int) -> tuple[Any, Any]:
    """Training and test set; those to classify with images of height and width `size`."""
    root = str(args.root)
    if args.data == "nyuv2":
        return NYUv2(root, "train"), NYUv2(root, "val")
    if args.data == "cityscapes":
        return CityScapes(root, "train"), CityScapes(root, "val")
    if args.data == "celeba":
        return CelebA(root, "train", size=size), CelebA(root, "test", size=size)
    if args.data == "clevr":
        return Clevr(root, "train", args.limit, size), Clevr(root, "val", args.limit, size)
    return SmallNORB(root, "train", args.limit, size), SmallNORB(root, "test", args.limit, size)


def make_heads(data: Any, width: int) -> dict[str, nn.Module]:
    """A decoder or a linear layer per task."""
    if "segmentation" in data.tasks:
        channels = {"segmentation": data.classes, "depth": 1, "normal": 3}
        return {task: Decoder(channels[task]) for task in data.tasks}
    classes = getattr(data, "classes", [1] * len(data.tasks))
    return {task: nn.Linear(width, count) for task, count in zip(data.tasks, classes, strict=True)}


def losses(outputs: dict[str, Tensor], labels: Any, num_items_in_batch: Any = None) -> dict[str, Tensor]:
    """Dense losses, binary cross-entropy for one logit, cross-entropy for several."""
    if "segmentation" in outputs:
        return dense_losses(outputs, labels)
    result = {}
    for task, logits in outputs.items():
        target = labels[f"labels_{task}"]
        if logits.shape[1] == 1:
            result[task] = nn.functional.binary_cross_entropy_with_logits(logits[:, 0], target)
        else:
            result[task] = nn.functional.cross_entropy(logits, target)
    return result


@torch.no_grad()
def evaluate(model: nn.Module, data: Any, batch_size: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Dense metrics; F1 for binary tasks; top-1 and top-5 accuracy for the others. In percent where that applies."""
    model.eval()
    outputs: dict[str, list[Tensor]] = {}
    targets: dict[str, list[Tensor]] = {}
    for batch in torch.utils.data.DataLoader(data, batch_size):
        for task, value in model(pixel_values=batch["pixel_values"].to(device)).items():
            outputs.setdefault(task, []).append(value.cpu())
            targets.setdefault(task, []).append(batch[f"labels_{task}"])
    metrics = {}
    for task in outputs:
        prediction, target = torch.cat(outputs[task]), torch.cat(targets[task])
        if task in METRICS:
            metrics[task] = METRICS[task](prediction, target)
        elif prediction.shape[1] == 1:
            positive, true = prediction[:, 0] > 0, target > 0
            f1 = 2 * (positive & true).sum() / (positive.sum() + true.sum()).clamp(min=1)
            metrics[task] = {"f1": 100.0 * float(f1)}
        else:
            ranked = prediction.argsort(1, descending=True)[:, :5] == target[:, None]
            metrics[task] = {f"top{k}": 100.0 * float(ranked[:, :k].any(1).double().mean()) for k in (1, 5)}
    return metrics


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=sorted(PRESETS), required=True)
    parser.add_argument("--root", type=Path, required=True, help="folder of the data set")
    parser.add_argument("--encoder", help="folder of a transformers vision model")
    parser.add_argument("--method", choices=METHODS, default="joint")
    parser.add_argument("--mask", choices=MASKS, default="psn", help="which of the encoder's weights are trained")
    parser.add_argument("--limit", type=int, default=1000, help="images of clevr and smallnorb; VTAB takes 1000")
    parser.add_argument("--epochs", type=float, help="if not the preset's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("mtl_public_output"))
    args = parser.parse_args(argv)
    is_dense = args.data in ("nyuv2", "cityscapes")
    if is_dense and args.encoder:
        parser.error(f"--encoder {args.encoder} gives one vector per image; {args.data} needs one per pixel")
    preset = PRESETS[args.data]
    torch.manual_seed(args.seed)
    classifier: Any = VisionEncoder(args.encoder) if args.encoder else Pooled()
    training, test = load(args, classifier.size)
    encoder = Encoder() if is_dense else classifier
    model = EncoderWithHeads(encoder, make_heads(training, classifier.width))
    model = masked(model, args.mask, preset.density, args.seed)
    config = MTLConfig(
        output_dir=str(args.out),
        mtl_method=args.method,
        mtl_method_kwargs=METHOD_OPTIONS.get(args.method),
        task_names=list(training.tasks),
        label_names=[f"labels_{task}" for task in training.tasks],
        num_train_epochs=args.epochs or preset.epochs,
        per_device_train_batch_size=preset.batch_size,
        learning_rate=preset.full_rate if args.mask == "full" else preset.sparse_rate,
        remove_unused_columns=False,
        logging_strategy="epoch",
        save_strategy="no",
        report_to="none",
        seed=args.seed,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = MTLTrainer(model=model, args=config, train_dataset=training, compute_task_losses_func=losses)
    trainer.train()
    metrics = evaluate(trainer.model, test, preset.batch_size, config.device)
    summary = trainer.conflicts.summary(trainer.state.max_steps)
    (args.out / "result.json").write_text(json.dumps({"test": metrics, **summary}, indent=1))
    for task, values in metrics.items():
        print(f"{task:14}" + "  ".join(f"{name} {value:.3f}" for name, value in values.items()))


if __name__ == "__main__":
    main()
