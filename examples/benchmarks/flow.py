"""
A sweep of knockouts by each engine: time, memory, and how far the results are apart.

    python examples/benchmarks/flow.py                     # 16 layers, 576 image tokens, one thread; some minutes

The model is a Llava of random weights: what is computed does not depend on them. A cell is the CPU time of one sweep
of one sample over all layers, its clean pass and vision tower included. Engines take turns within a round; a speed-up
is the median of the rounds' ratios. In each round the engines' log-probabilities are compared.

The second table blocks each patch by itself in all layers (patch_effects), beside the naive loop of one forward pass
per patch. Of the loop some patches are timed (--loop), and all of them are counted at that price.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any


os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from _common.arguments import out_file, positive, refusing
from _common.memory import peak_bytes
from _common.report import mebibytes, table
from _common.runner import finish, parser_for
from tqdm import tqdm
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from peft_ext.knockout import FlowSample, layer_sweep, patch_effects


CASES = {
    "image → question": ["image:question"],
    "question → last": ["question:last"],
    "image, question, last → last": ["image:last", "question:last", "last:last"],
}
ENGINES = ("full", "suffix", "packed")
TARGETS = ("last", "question")
IMAGE, VOCABULARY, HEADS = 4000, 4096, 8
TOLERANCE = 1e-4


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_for(__doc__)
    parser.add_argument("--layers", type=positive, default=16, help="of the decoder [%(default)s]")
    parser.add_argument("--width", type=positive, default=256, help="of the decoder [%(default)s]")
    parser.add_argument("--vision-layers", type=positive, default=2, help="of the vision tower [%(default)s]")
    parser.add_argument("--patches", type=positive, default=24, help="along the image's side [%(default)s]")
    parser.add_argument("--question", type=positive, default=12, help="tokens of the question [%(default)s]")
    parser.add_argument("--window", type=positive, default=9, help="layers that are blocked together [%(default)s]")
    parser.add_argument("--rounds", type=positive, default=3, help="in which the engines take turns [%(default)s]")
    parser.add_argument("--loop", type=positive, default=12, help="patches that the naive loop runs [%(default)s]")
    parser.add_argument(
        "--parts", nargs="+", choices=("sweeps", "patches"), default=["sweeps", "patches"], help="[both]"
    )
    parser.add_argument("--threads", type=positive, default=1, help="[%(default)s]")
    parser.add_argument("--out", type=out_file, help="write everything to this JSON file")
    options = parser.parse_args(argv)
    with refusing(parser):
        if options.width % (2 * HEADS):
            raise ValueError(f"--width {options.width} must split into {HEADS} heads of an even width: change it")
    return options


def build(options: argparse.Namespace) -> tuple[LlavaForConditionalGeneration, FlowSample]:
    """The model, and a sample: 35 tokens of template, the image, the question, 19 tokens of template."""
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=options.width,
        intermediate_size=options.width * 11 // 4,
        num_hidden_layers=options.layers,
        num_attention_heads=HEADS,
        max_position_embeddings=4096,
        initializer_range=0.1,  # large enough for a knockout to change the answer
    )
    vision = CLIPVisionConfig(
        hidden_size=options.width,
        intermediate_size=4 * options.width,
        num_hidden_layers=options.vision_layers,
        num_attention_heads=HEADS,
        image_size=14 * options.patches,
        patch_size=14,
    )
    tokens = options.patches**2
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, image_seq_length=tokens)
    model = LlavaForConditionalGeneration(config).eval()
    before, after = torch.randint(3, IMAGE, (1, 35)), torch.randint(3, IMAGE, (1, options.question + 20))
    ids = torch.cat([before, torch.full((1, tokens), IMAGE), after], dim=1)
    at = torch.arange(ids.shape[1])[None]
    start = 35 + tokens + 1
    groups = {
        "image": ids == IMAGE,
        "question": (at >= start) & (at < start + options.question),
        "last": at == ids.shape[1] - 1,
    }
    pixels = torch.randn(1, 3, vision.image_size, vision.image_size)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    return model, FlowSample(inputs, groups)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of this process, which other processes on the machine hardly change, and the result."""
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def measure(options: argparse.Namespace, model: LlavaForConditionalGeneration, sample: FlowSample) -> dict[str, Any]:

    def sweep(pairs: list[str], engine: str) -> list[dict[str, Any]]:
        return layer_sweep(
            model, sample, pairs, window=options.window, engine=engine, self_check=False, progress=False
        )

    @torch.no_grad()
    def forward() -> None:
        model(**sample.inputs)

    layer_sweep(model, sample, "last:last", engine="packed", self_check=False, progress=False)  # warm up
    seconds: dict[str, dict[str, list[float]]] = {case: {engine: [] for engine in ENGINES} for case in CASES}
    apart, change = dict.fromkeys(CASES, 0.0), dict.fromkeys(CASES, 0.0)
    clean = []
    bar = tqdm(total=options.rounds * len(CASES) * len(ENGINES), desc="sweeps")
    for _ in range(options.rounds):
        clean.append(timed(forward)[0])
        for case, pairs in CASES.items():
            found = {}
            for engine in ENGINES:
                spent, records = timed(lambda pairs=pairs, engine=engine: sweep(pairs, engine))
                seconds[case][engine].append(spent)
                found[engine] = torch.tensor([record["probability"] for record in records]).log()
                bar.update()
            change[case] = max(abs(record["change_percent"]) for record in records)
            for engine in ENGINES[1:]:
                apart[case] = max(apart[case], float((found[engine] - found["full"]).abs().max()))
            if not apart[case] <= TOLERANCE:
                raise SystemExit(f"{case}: engines differ by {apart[case]:.1e} in log-probability; times mean nothing")
    bar.close()
    device = torch.device("cpu")
    memory = {"clean forward": peak_bytes(forward, device)}
    for engine in ENGINES[1:]:
        memory[engine] = max(
            peak_bytes(lambda pairs=pairs, engine=engine: sweep(pairs, engine), device) for pairs in CASES.values()
        )
    return {
        "tokens": sample.inputs["input_ids"].shape[1],
        "seconds": seconds,
        "clean_forward_seconds": clean,
        "speedup": {
            case: {
                engine: statistics.median(a / b for a, b in zip(own["full"], own[engine], strict=True))
                for engine in ENGINES
            }
            for case, own in seconds.items()
        },
        "log_probability_difference": apart,
        "largest_change_percent": change,
        "peak_bytes": memory,
    }


def measure_patches(
    options: argparse.Namespace, model: LlavaForConditionalGeneration, sample: FlowSample
) -> dict[str, Any]:
    """Each patch blocked by itself: packed, and one forward pass after the other, of which some are run."""
    image = sample.groups["image"]
    order, patches = image.cumsum(1) - 1, int(image.sum())
    some = torch.linspace(0, patches - 1, min(options.loop, patches)).long().unique().tolist()
    masks = {str(at): image & (order == at) for at in some}
    result = {}
    for target in TARGETS:
        own: dict[str, Any] = {"loop": [], "packed": [], "speedup": [], "log_probability_difference": 0.0}
        for _ in tqdm(range(options.rounds), desc=f"patches → {target}"):
            loop, expected = timed(
                lambda target=target: patch_effects(model, sample, target, sources=masks, engine="full")
            )
            packed, records = timed(
                lambda target=target: patch_effects(model, sample, target, engine="packed", self_check=False)
            )
            own["packed"].append(packed)
            own["loop"].append(loop / (len(some) + 1) * (patches + 1))  # with the clean pass
            own["speedup"].append(own["loop"][-1] / packed)
            for at, record in zip(some, expected, strict=True):
                apart = abs(math.log(record["probability"]) - math.log(records[at]["probability"]))
                own["log_probability_difference"] = max(own["log_probability_difference"], apart)
            own["largest_change_percent"] = max(abs(record["change_percent"]) for record in records)
            if not own["log_probability_difference"] <= TOLERANCE:
                raise SystemExit(f"patches → {target}: packed and loop differ by {own['log_probability_difference']}")
        result[target] = {**own, "patches": patches, "patches_in_loop": len(some)}
    return result


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    torch.set_num_threads(options.threads)
    model, sample = build(options)
    result = {}
    if "sweeps" in options.parts:
        result |= measure(options, model, sample)
        print_sweeps(result)
    if "patches" in options.parts:
        result["patch_effects"] = measure_patches(options, model, sample)
        print_patches(result["patch_effects"])
    finish(options, {"settings": {k: v for k, v in vars(options).items() if k != "out"}, **result})
    return 0


def print_sweeps(result: dict[str, Any]) -> None:
    rows = []
    for case, own in result["seconds"].items():
        row = {"blocked": case}
        for engine in ENGINES:
            row[f"{engine}, s"] = f"{statistics.median(own[engine]):.2f}"
        for engine in ENGINES[1:]:
            row[f"{engine}, times faster"] = f"{result['speedup'][case][engine]:.1f}"
        row["log p apart"] = f"{result['log_probability_difference'][case]:.0e}"
        rows.append(row)
    print(table(rows))
    print(f"\nclean forward: {statistics.median(result['clean_forward_seconds']):.2f} s")
    least = result["peak_bytes"]["clean forward"]
    for name, count in result["peak_bytes"].items():
        print(f"peak memory, {name}: {mebibytes(count)} MiB, {count / least:.2f} × the clean forward")


def print_patches(result: dict[str, Any]) -> None:
    rows = [
        {
            "each patch →": target,
            "loop, s": f"{statistics.median(own['loop']):.1f}",
            "packed, s": f"{statistics.median(own['packed']):.2f}",
            "times faster": f"{statistics.median(own['speedup']):.1f}",
            "log p apart": f"{own['log_probability_difference']:.0e}",
        }
        for target, own in result.items()
    ]
    print(f"\n{table(rows)}")


if __name__ == "__main__":
    raise SystemExit(main())
