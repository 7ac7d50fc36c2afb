"""
Time and peak memory of each way to choose entries, on a ViT of 100 million parameters.

    python examples/benchmarks/selection.py                     # CPU: sums offloaded to files
    python examples/benchmarks/selection.py --device cuda       # sums offloaded to the CPU's memory

Scores are compared with those of ordinary backward passes first. A peak is what the allocator has handed out at once
beyond the weights and the batches; files that sums are offloaded to are not in it. Times are medians over rounds in
which every selector runs once. The table goes to the screen, everything else to a JSON file.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _common.arguments import at_least, positive, refusing
from _common.memory import peak_bytes
from _common.methods import share
from _common.report import mebibytes, table
from _common.runner import add_run, begin, finish, parser_for
from _common.steps import Stepper, timed
from peft import get_peft_model
from torch import Tensor, nn
from tqdm import tqdm
from transformers import ViTConfig, ViTForImageClassification

from peft_ext import GPSConfig, SupervisedContrastiveLoss, activation_scores, gradient_scores


RESULTS = Path(__file__).parent / "results"
TOLERANCE = 1e-4  # of the largest score; sums in another order differ by some 1e-6
ALLOWED = 1.10  # offloaded peak over activations and one gradient
CLASSES = 10

Batches = list[dict[str, Tensor]]


class GateError(RuntimeError):
    """Scores are wrong: what they cost means nothing."""


@dataclass(frozen=True)
class Selector:
    """
    One way to choose entries.

    Args:
        selection (`str`): Of the config.
        score (`Callable`, *optional*): Makes the scores; `None` where the weights themselves are ranked.
    """

    selection: str
    score: Callable[[nn.Module], Any] | None


def build(layers: int, hidden: int, image: int, device: torch.device) -> ViTForImageClassification:
    """A ViT with random weights; patches of 16 pixels."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        image_size=image,
        num_labels=CLASSES,
    )
    return ViTForImageClassification(config).to(device).eval()


def random_batches(count: int, size: int, image: int, device: torch.device) -> Batches:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(size) % (size // 2)  # every class twice, so that every image has a partner
    return [
        {
            "pixel_values": torch.randn(size, 3, image, image, generator=generator).to(device),
            "labels": (labels % CLASSES).to(device),
        }
        for _ in range(count)
    ]


def features(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model.vit(pixel_values=batch["pixel_values"]).last_hidden_state[:, 0]  # type: ignore[union-attr, operator]


def ordinary_backward(model: nn.Module, batches: Batches) -> None:
    """Passes that keep and add up every gradient, as a training script would."""
    model.requires_grad_(True)
    for batch in batches:
        SupervisedContrastiveLoss()(features(model, batch), batch["labels"]).backward()


def forward_alone(model: nn.Module, batches: Batches) -> None:
    """What a forward pass keeps for the backward pass, all weights requiring gradients."""
    model.requires_grad_(True)
    SupervisedContrastiveLoss()(features(model, batches[0]), batches[0]["labels"])


def selectors(batches: Batches, anchor: Batches, offload: bool | str) -> dict[str, Selector]:
    """All rows of the table."""
    quiet = {"progress": False}
    return {
        "magnitude": Selector("magnitude", None),
        "random": Selector("random", None),
        "activation": Selector("activation", lambda model: activation_scores(model, batches, **quiet)),
        "activation growth": Selector("activation", lambda m: activation_scores(m, batches, anchor=anchor, **quiet)),
        "gradient": Selector("gradient", lambda model: gradient_scores(model, batches, **quiet)),
        "gradient, offloaded": Selector(
            "gradient", lambda model: gradient_scores(model, batches, offload=offload, **quiet)
        ),
    }


def choose(base: nn.Module, selector: Selector) -> nn.Module:
    """Both stages on a copy of the model that shares its weights."""
    model = fresh(base)
    config = GPSConfig(k=1, selection=selector.selection)
    if selector.score is not None:
        config.with_scores(selector.score(model))
    return get_peft_model(model, config)


def gate(base: nn.Module, batches: Batches, found: dict[str, Selector]) -> dict[str, float]:
    """Largest error of each gradient selector's scores against ordinary passes, relative to the largest score.

    Raises:
        `GateError`: if one is larger than `TOLERANCE`.
    """
    plain = share(base)
    ordinary_backward(plain, batches)
    kept = {name: parameter.grad for name, parameter in plain.named_parameters()}
    errors = {}
    for name, selector in found.items():
        if selector.selection != "gradient" or selector.score is None:
            continue
        scores = selector.score(fresh(base))
        errors[name] = 0.0
        for module, score in scores.items():
            expected = kept[f"{module}.weight"]
            assert expected is not None
            error = (score.to(expected) - expected).abs().max() / expected.abs().max()
            errors[name] = max(errors[name], float(error))
        if not errors[name] <= TOLERANCE:
            raise GateError(f"The scores of '{name}' are off by {errors[name]:.1e}; nothing is measured.")
    return errors


def optimiser_bytes(model: nn.Module, batch: dict[str, Tensor]) -> int:
    stepper = Stepper(model.train(), batch)
    stepper()
    return stepper.optimizer_bytes()


@contextlib.contextmanager
def offload_target(device: torch.device) -> Iterator[bool | str]:
    if device.type == "cuda":
        yield True
    else:
        with tempfile.TemporaryDirectory() as folder:
            yield folder


def fresh(base: nn.Module) -> nn.Module:
    """A copy that shares the weights, none of which has a gradient."""
    base.zero_grad(set_to_none=True)
    gc.collect()
    return share(base)


def measured_peak(work: Callable[[nn.Module], object], base: nn.Module, device: torch.device) -> int:
    model = fresh(base)
    return peak_bytes(lambda: work(model), device)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    options = parser_for(__doc__)
    options.add_argument("--layers", type=positive, default=14, help="blocks [%(default)s]")
    options.add_argument("--hidden", type=positive, default=768, help="width [%(default)s]")
    options.add_argument("--image", type=positive, default=96, help="pixels a side [%(default)s]")
    options.add_argument("--batch", type=at_least(4), default=4, help="images per batch [%(default)s]")
    options.add_argument("--batches", type=positive, default=2, help="batches to score by [%(default)s]")
    options.add_argument("--rounds", type=positive, default=3, help="timed rounds [%(default)s]")
    add_run(options, dtypes=())
    args = options.parse_args(argv)
    with refusing(options):
        if args.hidden % 64:
            raise ValueError(f"--hidden {args.hidden} is no multiple of 64, the width of a head: pass one")
        if args.image % 16:
            raise ValueError(f"--image {args.image} is no multiple of 16, the side of a patch: pass one")
    if args.out is None:
        args.out = RESULTS / f"selection_{torch.device(args.device).type}.json"
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = parse(argv)
    _, device = begin(args)
    base = build(args.layers, args.hidden, args.image, device)
    batches = random_batches(args.batches, args.batch, args.image, device)
    anchor = random_batches(args.batches, args.batch, args.image, device)
    with offload_target(device) as offload:
        found = selectors(batches, anchor, offload)
        errors = gate(base, batches, found)
        references = {"forward": forward_alone, "ordinary backward": ordinary_backward}
        peaks = {
            name: measured_peak(lambda model, work=work: work(model, batches), base, device)
            for name, work in references.items()
        }
        scoring, choosing = {}, {}
        for name, selector in tqdm(found.items(), desc="memory", unit="selector"):
            score = selector.score
            scoring[name] = measured_peak(score, base, device) if score is not None else 0
            choosing[name] = measured_peak(lambda model, selector=selector: choose(model, selector), base, device)
        times: dict[str, list[float]] = {name: [] for name in [*found, "ordinary backward"]}
        for _ in tqdm(range(args.rounds), desc="time", unit="round"):
            for name, selector in found.items():
                times[name].append(timed(lambda selector=selector: choose(base, selector), device)[1])
            model = fresh(base)
            times["ordinary backward"].append(
                timed(lambda model=model: ordinary_backward(model, batches), device)[1]  # type: ignore[misc]
            )
            del model
        adapted = choose(base, found["gradient, offloaded"])
        optimisers = {
            "GPS": optimiser_bytes(adapted, batches[0]),
            "masked dense training": optimiser_bytes(fresh(base).requires_grad_(True), batches[0]),
        }
    largest = max(m.weight.nbytes for m in base.modules() if isinstance(m, (nn.Linear, nn.Conv2d)))
    bound = peaks["forward"] + largest
    rows = [
        {
            "selector": name,
            "time, s": f"{statistics.median(times[name]):.2f}",
            "peak of scoring, MiB": mebibytes(scoring[name]),
            "peak with choice, MiB": mebibytes(choosing[name]),
        }
        for name in found
    ]
    rows.append(
        {
            "selector": "(ordinary backward)",
            "time, s": f"{statistics.median(times['ordinary backward']):.2f}",
            "peak of scoring, MiB": mebibytes(peaks["ordinary backward"]),
            "peak with choice, MiB": "",
        }
    )
    content = {
        "shape": {name: getattr(args, name) for name in ("layers", "hidden", "image", "batch", "batches")},
        "parameters": sum(p.numel() for p in base.parameters()),
        "score_errors": errors,
        "seconds": times,
        "scoring_peak_bytes": scoring,
        "choosing_peak_bytes": choosing,
        "reference_peak_bytes": peaks,
        "largest_gradient_bytes": largest,
        "offloaded_peak_over_bound": scoring["gradient, offloaded"] / bound,
        "optimiser_bytes": optimisers,
    }
    finish(args, content)
    print(f"\n{table(rows)}\n")
    print(
        f"{content['parameters']:,} parameters; activations {mebibytes(peaks['forward'])} MiB, largest gradient",
        end=" ",
    )
    print(
        f"{mebibytes(largest)} MiB; offloaded scoring peaks at {content['offloaded_peak_over_bound']:.3f} of their sum"
    )
    print(f"AdamW's state: {', '.join(f'{name} {mebibytes(size)} MiB' for name, size in optimisers.items())}")
    print(f"written to {args.out}")
    return content


if __name__ == "__main__":
    sys.exit(0 if main()["offloaded_peak_over_bound"] <= ALLOWED else 1)
