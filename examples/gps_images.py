"""
GPS on images: which entries a task's gradients select, and what training them is worth.

    python examples/gps_images.py

pretrains a small ViT and a small ConvNeXt on scikit-learn's digits 0-4 and adapts them to 5-9 with GPS, two of its
ablations, NeuroAda, LoRA, BitFit, a linear probe and full fine-tuning, the learning rate of each searched with equal
effort. It needs no network and no GPU.

    python examples/gps_images.py --model google/vit-base-patch16-224-in21k --data path/to/folder --preset vtab/dtd

adapts any model of `AutoModelForImageClassification` to a folder of images by class, or to a data set of the Hub, and
saves the adapter. (Needs pip install 'peft-ext[plot]' datasets pillow.)
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec


# As in the quick start: spinning threads of OpenMP slow each other down. Read once, when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from _gps_images.models import ARCHITECTURES
from _quickstart import report
from _quickstart.command import begin, check_counts, parser_for

from peft_ext import GPS_PRESETS
from peft_ext.sparse.selection.plan import SELECTIONS


def parser() -> argparse.ArgumentParser:
    options = parser_for(__doc__, "gps_images_output")
    options.add_argument("--k", type=int, help="entries per neuron [1, or the preset's]")
    options.add_argument(
        "--seed", type=int, default=0, help="of the selection and of training on --data [%(default)s]"
    )

    digits = options.add_argument_group("the digits comparison")
    digits.add_argument("--models", nargs="+", choices=list(ARCHITECTURES), default=list(ARCHITECTURES))
    digits.add_argument("--seeds", type=int, help="runs per method that the result is averaged over [3]")
    digits.add_argument("--trials", type=int, help="learning rates tried per method, half a decade apart [8]")
    digits.add_argument("--smoke", action="store_true", help="smallest possible run: does it work, not how well")

    own = options.add_argument_group("a model and data of your own")
    own.add_argument("--model", help="Hub id or folder of an image classifier or its backbone: switches to this mode")
    own.add_argument("--data", help="folder of images by class, or Hub id of a data set with labels")
    own.add_argument("--data-config", help="configuration of the data set, where it has several")
    own.add_argument(
        "--preset",
        choices=sorted(GPS_PRESETS),
        metavar="TASK",
        help="k, learning rate, batch size, epochs and drop path of the thesis: " + ", ".join(sorted(GPS_PRESETS)),
    )
    own.add_argument("--selection", choices=SELECTIONS, default="gradient", metavar="NAME", help="[%(default)s]")
    own.add_argument("--learning-rate", "--lr", type=float, help="[1e-3, or the preset's]")
    own.add_argument("--batch-size", type=int, help="[32, or the preset's]")
    own.add_argument("--epochs", type=int, help="[20, or the preset's]")
    own.add_argument("--offload", action="store_true", help="keep the scores in the CPU's memory while they add up")
    return options


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    options = parser()
    chosen = options.parse_args(argv)
    if bool(chosen.model) != bool(chosen.data):
        options.error("--model and --data go together: give both, or none for the offline digits")
    missing = [name for name in ("datasets", "PIL", "matplotlib") if find_spec(name) is None]
    if chosen.model and missing:
        options.error(f"--data needs packages that are not installed: {', '.join(missing)}")
    check_counts(options, chosen, ("k", "seeds", "trials", "batch_size", "epochs"))
    return chosen


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    start, start_cpu = time.perf_counter(), time.process_time()
    begin(options.out)
    if options.model:
        from _gps_images import images  # needs datasets, which the digits do without

        text, content = images.run(options)
    else:
        from _gps_images import digits

        chosen = [ARCHITECTURES[name] for name in options.models]
        text, content = digits.run(chosen, options.smoke, options.k or 1, options.seeds, options.trials, options.out)
    content["environment"] = report.environment()
    content["wall_seconds"] = time.perf_counter() - start
    content["cpu_seconds"] = time.process_time() - start_cpu
    report.write_json(options.out / "gps_images.json", content)
    print(f"\n{text}\n\n{content['wall_seconds']:.0f} s. Results and selection reports: {options.out}/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
