"""
All that a GPU has to show, in one command without network: kernels, bandwidth, steps, experts, start-up, crossovers,
tests.

    python3 examples/benchmarks/gpu_check.py --out results --minutes 5
    python3 examples/benchmarks/gpu_check.py --out results --minutes 4 --stages steps,startup
    python3 examples/benchmarks/gpu_check.py --out rehearsal --device cpu --tiny     # nothing but a rehearsal

A stage is a process of its own. It stops between cases when its share of the time is over, is ended if it does not,
goes on after a failed case, and keeps what it found in OUT/<stage>.json after each one (the end: OUT/summary.txt):

- `kernels`: every Triton kernel in every configuration that can be chosen, against dense matrices in fp64;
- `bandwidth`: the products of `ops.py`, beside copies of as many bytes;
- `steps`: a training step at Llama-3-8B's blocks, method by method, without and with checkpointing;
- `experts`: a training step at one mixture of Mixtral and one of Qwen3-MoE, beside LoRA;
- `startup`: choosing, saving, merging and loading at all 32 layers of these shapes;
- `crossovers`: the paths of `crossover.py` at larger layers, fp32;
- `suite`: a sample of `pytest -m gpu`.

It runs from a checkout on what PyTorch 2.11, its Triton, transformers 5.17, accelerate, numpy, tqdm and (for `suite`)
pytest, hypothesis and pytest-xdist give. peft must be 0.21 or later: carry its wheel (`peft==0.21.2`, 1 MB, installed
with `--no-deps`) where there is an older one. Nothing else has to be carried.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path


# Most informative first, with its share of the time; what a stage does not need goes to those after it.
STAGES = {"kernels": 6, "bandwidth": 5, "steps": 7, "experts": 2, "startup": 5, "crossovers": 3, "suite": 4}
ROOT = Path(__file__).resolve().parents[2]
PEFT = (0, 21)
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "TQDM_DISABLE": "1",
    "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
}
sys.path.insert(1, str(ROOT))
GRACE = 5  # seconds beyond its share after which a stage is ended


def stage_names(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in STAGES]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is no stage: pass some of {','.join(STAGES)}")
    return names


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("gpu_check_output"), help="folder of the results (%(default)s)"
    )
    parser.add_argument("--minutes", type=float, default=5.0, help="for everything (%(default)s)")
    parser.add_argument("--stages", type=stage_names, default=list(STAGES), help=f"in this order ({','.join(STAGES)})")
    parser.add_argument("--layers", type=int, default=16, help="decoder blocks of `steps` (%(default)s)")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to rehearse (%(default)s)")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, one or two cases of a kind")
    parser.add_argument("--no-preload", action="store_true", help="let each stage import what it needs by itself")
    args = parser.parse_args(argv)
    if not args.minutes > 0:
        parser.error(f"--minutes {args.minutes} leaves no time: pass a positive number")
    if args.layers < 1:
        parser.error(f"--layers {args.layers} is no number of blocks: pass a positive one")
    return args


def run_stage(name: str, seconds: float, args: argparse.Namespace) -> None:
    """A stage, in this process."""
    from _gpu_check.record import Record

    record = Record(name, args, seconds)
    importlib.import_module(f"_gpu_check.{name}").run(record, args)
    record.finish()


def require_peft() -> None:
    """
    Raises:
        `SystemExit`: without the PEFT that `peft_ext` extends, nothing can be measured.
    """
    found = importlib.metadata.version("peft")
    if tuple(map(int, found.split(".")[:2])) < PEFT:
        raise SystemExit(
            f"peft {found} is older than {'.'.join(map(str, PEFT))}: carry a wheel of it and install that"
        )


def preload(args: argparse.Namespace) -> None:
    """Import once what the stages need. If that touches CUDA, begin again without it."""
    from _gpu_check.processes import device_answers

    for name in STAGES:
        importlib.import_module(f"_gpu_check.{name}")
    if not device_answers(args.device):
        print("the device can't be used after what was imported: every stage imports by itself", flush=True)
        os.execv(sys.executable, [sys.executable, *sys.argv, "--no-preload"])


def main(argv: Sequence[str] | None = None) -> dict[str, str]:
    args = parse(argv)
    require_peft()
    os.environ.update(ENVIRONMENT | ({"TRITON_INTERPRET": "1"} if args.device == "cpu" else {}))
    begin = time.monotonic()
    deadline = begin + 60 * args.minutes
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.no_preload:
        preload(args)
    from _gpu_check.processes import each
    from _gpu_check.summary import summary

    ended: dict[str, str] = {}
    for number, name in enumerate(args.stages):
        weight = STAGES[name] / sum(STAGES[later] for later in args.stages[number:])
        seconds = (deadline - time.monotonic()) * weight - GRACE
        print(f"== {name}: {seconds:.0f} s, {time.monotonic() - begin:.0f} s since the start", flush=True)
        work = partial(run_stage, name, seconds, args)
        ((_, ended[name]),) = each([work], 1, partial(max, seconds + GRACE, 0.0))
        print(f"== {name} {ended[name]}", flush=True)
    text = summary(args.out, ended)
    (args.out / "summary.txt").write_text(text)
    print(text, flush=True)
    return ended


if __name__ == "__main__":
    main()
