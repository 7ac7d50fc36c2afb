"""
Train one of three computed multi-task problems, with all weights or sparsely (PSN), by any method.

    python examples/mtl/synthetic.py --bench digits --method pcgrad --mask psn --out out/digits

`digits`: two overlaid digits (T = 2). `sprites`: five questions about a shape, 1000 images, pretrained encoder (T =
5). `scenes`: segmentation, depth and normals of rendered scenes, with NYUv2's metrics (T = 3).
The folder gets the conflicts of every step (`gradient_conflicts.jsonl`), figures with their data, and `result.json`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from _benches import BENCHES
from _benches.runs import MASKS, Run, train

from peft_ext.mtl import METHODS
from peft_ext.mtl.conflicts.plots import plot_angles, plot_cosines, plot_incidence, plot_layers, read_conflicts


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", choices=sorted(BENCHES), default="digits")
    parser.add_argument("--method", choices=METHODS, default="joint")
    parser.add_argument("--mask", choices=MASKS, default="full", help="which of the encoder's weights are trained")
    parser.add_argument("--density", type=float, default=0.3, help="their share, unless all")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--epochs", type=int, help="if not the problem's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("mtl_output"))
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    run = Run(args.bench, args.method, args.mask, args.learning_rate, args.seed, args.density, epochs=args.epochs)
    result = train(
        BENCHES[args.bench],
        run,
        str(args.out),
        conflict_granularity="layer",
        disable_tqdm=False,
        logging_strategy="epoch",
    )
    (args.out / "result.json").write_text(json.dumps(result, indent=1))
    conflicts = read_conflicts(str(args.out / "gradient_conflicts.jsonl"))
    plot_incidence({f"{args.method}, {args.mask}": conflicts}, str(args.out / "incidence.png"))
    plot_cosines(conflicts, str(args.out / "cosines.png"))
    plot_angles(conflicts, str(args.out / "angles.png"))
    plot_layers(conflicts, str(args.out / "layers.png"))
    for task, metrics in result["test"].items():
        print(f"{task:14}" + "  ".join(f"{name} {value:.3f}" for name, value in metrics.items()))
    for name in ("incidence_all", "incidence_last_half", "noise_floor"):
        print(f"{name:22}{result.get(f'gradient_conflict_{name}', float('nan')):.1f} %")


if __name__ == "__main__":
    main()
