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
from _benches.runs import MASKS, masked
from _benches.scenes import Encoder
from _layouts.arrays import CityScapes, NYUv2
from _layouts.celeba import CelebA
from _layouts.clevr import Clevr
from _layouts.models import Pooled, VisionEncoder, make_heads
from _layouts.presets import METHOD_OPTIONS, PRESETS
from _layouts.scores import evaluate, losses
from _layouts.smallnorb import SmallNORB

from peft_ext.mtl import METHODS, MTLConfig, MTLTrainer


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
