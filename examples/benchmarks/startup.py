"""
What a user waits for around training: adapting, saving, loading, switching, merging, unmerging, file size and memory.

    python examples/benchmarks/startup.py                       # Llama-shaped models of 1.1 and 3.2 billion parameters
    python examples/benchmarks/startup.py --sizes 1b --rounds 1
    python examples/benchmarks/startup.py --cpu-time            # the table in CPU time, for a machine that others use
    python examples/benchmarks/startup.py --quick               # a tiny model, one round: whether everything runs

Every run is a process of its own, and methods alternate within a round, so that a slow spell of the machine hits all
of them; the table has medians over rounds. A run makes sure that what it loads has the bits that it saved. Beside the
seconds stand two ratios: choosing over one `weight.abs().amax(1)` pass over the same weights, and loading over LoRA's
in the same round. Peaks are what the allocator has handed out at once beyond the base model, measured apart.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from _common.arguments import out_file, positive
from _common.memory import peak_bytes
from _common.methods import share, targeted
from _common.models import LINEARS, Shape
from _common.report import environment, mebibytes, table, write_report
from _common.runner import parser_for, run_apart
from peft import LoraConfig, PeftConfig, PeftModel, ShiraConfig, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig

from peft_ext import NeuroAdaConfig


RESULTS = Path(__file__).parent / "results"
CPU = torch.device("cpu")
SIZES = {
    "tiny": Shape(hidden=64, intermediate=128, layers=2, heads=4, vocab=64, batch=1, tokens=8),
    "1b": Shape(hidden=2048, intermediate=8192, layers=16, heads=32, vocab=8192, batch=1, tokens=8),
    "3b": Shape(hidden=3072, intermediate=8192, layers=28, heads=24, vocab=8192, batch=1, tokens=8),
}
METHODS: dict[str, Callable[[], PeftConfig]] = {
    "lora-r8": lambda: LoraConfig(r=8, target_modules=list(LINEARS)),
    "neuroada-k1": lambda: NeuroAdaConfig(k=1, target_modules=list(LINEARS)),
    "neuroada-k20": lambda: NeuroAdaConfig(k=20, target_modules=list(LINEARS)),
    "shira-r8": lambda: ShiraConfig(r=8, target_modules=list(LINEARS), random_seed=0),
}
Runs = dict[str, list[dict[str, Any]]]  # of each method, one per round
STEPS = ("adapt", "save", "load", "load second", "switch", "merge", "unmerge")


def model_of(shape: Shape) -> nn.Module:
    """A bf16 Llama whose weights are normal numbers, taken from one long row at changing places: a second per billion
    instead of a minute."""
    config = LlamaConfig(
        hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, vocab_size=shape.vocab, max_position_embeddings=shape.tokens,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    row = torch.randn(2**24 + 1, generator=generator).mul_(0.02).to(torch.bfloat16)
    for number, parameter in enumerate(model.parameters()):
        flat, start = parameter.data.view(-1), 7919 * number
        for begin in range(0, flat.numel(), 2**23):
            part = flat[begin : begin + 2**23]
            part.copy_(row[start % 2**23 :][: part.numel()])
            start += 104729
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers are computed, not drawn
    return model.requires_grad_(False).eval()


def seconds(work: Callable[[], object]) -> dict[str, float]:
    """Time on the wall, and of all of this process's threads."""
    clocks = {"wall": time.perf_counter, "cpu": time.process_time}
    begin = {name: clock() for name, clock in clocks.items()}
    work()
    return {name: clock() - begin[name] for name, clock in clocks.items()}


def amax_pass(weights: list[Tensor]) -> dict[str, float]:
    """Time of one pass that takes the largest magnitude of every row: what choosing cannot go below by much."""
    passes = [seconds(lambda: [weight.abs().amax(1) for weight in weights]) for _ in range(3)]
    return {clock: statistics.median(times[clock] for times in passes) for clock in passes[0]}


def digest(tensors: list[Tensor]) -> list[int]:
    return [int(tensor.detach().contiguous().view(torch.int16).sum(dtype=torch.int64)) for tensor in tensors]


def fill(model: nn.Module) -> None:
    """Values as training leaves them: none of them zero."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.01)


def assert_equal_adapters(loaded: nn.Module, saved: dict[str, Tensor]) -> None:
    """
    Raises:
        `RuntimeError`: if a tensor of the loaded adapter has other bits than the saved one.
    """
    for name, tensor in get_peft_model_state_dict(loaded).items():
        if tensor.dtype != saved[name].dtype or not torch.equal(
            tensor.view(torch.uint8), saved[name].view(torch.uint8)
        ):
            raise RuntimeError(f"'{name}' was not loaded as it was saved: nothing is measured.")


def run(method: str, size: str, threads: int) -> dict[str, Any]:
    """Everything about one method, in this process."""
    torch.set_num_threads(threads)
    config = METHODS[method]
    with tempfile.TemporaryDirectory() as folder:  # imports and thread pools are nobody's cost
        get_peft_model(model_of(SIZES["tiny"]), config()).save_pretrained(folder)
        PeftModel.from_pretrained(model_of(SIZES["tiny"]), folder)
    base = model_of(SIZES[size])
    weights = [linear.weight for linear in targeted(base, LINEARS)]
    before, load = digest(weights), os.getloadavg()[0]
    times = {"amax pass": amax_pass(weights)}
    models: dict[str, Any] = {}

    def timed(step: str, work: Callable[[], Any]) -> None:
        gc.collect()
        times[step] = seconds(lambda: models.update({step: work()}))

    plain = share(base)
    timed("adapt", lambda: get_peft_model(plain, config()))
    fill(models["adapt"])
    saved = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(models["adapt"]).items()}
    with tempfile.TemporaryDirectory() as folder:
        timed("save", lambda: models["adapt"].save_pretrained(folder))
        file_bytes = (Path(folder) / "adapter_model.safetensors").stat().st_size
        models.clear()
        plain = share(base)
        timed("load", lambda: PeftModel.from_pretrained(plain, folder))
        assert_equal_adapters(models["load"], saved)
        timed("load second", lambda: models["load"].load_adapter(folder, "second"))
        timed("switch", lambda: models["load"].set_adapter("second"))
        timed("merge", lambda: models["load"].merge_adapter(["second"]))
        timed("unmerge", lambda: models["load"].unmerge_adapter())
        restored = digest(weights) == before
        models.clear()
        gc.collect()
        peaks = {
            "adapt": peak_bytes(lambda: get_peft_model(share(base), config()), CPU),
            "load": peak_bytes(lambda: PeftModel.from_pretrained(share(base), folder), CPU),
        }
    return {
        "seconds": times,
        "peak_bytes": peaks,
        "file_bytes": file_bytes,
        "adapter_bytes": sum(tensor.nbytes for tensor in saved.values()),
        "unmerging_restores_every_bit": restored,
        "parameters": sum(p.numel() for p in base.parameters()),
        "load_average": load,
    }


def run_alone(method: str, size: str, threads: int) -> dict[str, Any]:
    """[`run`] in a process of its own."""
    return run_apart(__file__, ["--worker", method, "--sizes", size, "--threads", str(threads)], threads)


def ratios(runs: Runs, clock: str) -> dict[str, dict[str, float]]:
    """Medians over rounds: choosing over the pass, loading over LoRA's of the same round."""
    found: dict[str, dict[str, float]] = {}
    for method, mine in runs.items():
        times = [{step: both[clock] for step, both in run["seconds"].items()} for run in mine]
        found[method] = {"adapt / amax pass": statistics.median(t["adapt"] / t["amax pass"] for t in times)}
        if "lora-r8" in runs:
            loads = [run["seconds"]["load"][clock] for run in runs["lora-r8"]]
            pairs = zip(times, loads, strict=True)
            found[method]["load / LoRA"] = statistics.median(t["load"] / load for t, load in pairs)
    return found


def rows(runs: Runs, clock: str) -> list[dict[str, str]]:
    shown = []
    for method, mine in runs.items():
        median = {step: statistics.median(run["seconds"][step][clock] for run in mine) for step in STEPS}
        shown.append(
            {
                "method": method,
                **{f"{step}, s": f"{value:.3f}" for step, value in median.items()},
                **{name: f"{ratio:.2f}" for name, ratio in ratios(runs, clock)[method].items()},
                "peak adapting, MiB": mebibytes(max(run["peak_bytes"]["adapt"] for run in mine)),
                "peak loading, MiB": mebibytes(max(run["peak_bytes"]["load"] for run in mine)),
                "file, MiB": mebibytes(mine[0]["file_bytes"]),
                "bits back": "yes" if all(run["unmerging_restores_every_bit"] for run in mine) else "no",
            }
        )
    return shown


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    options = parser_for(__doc__)
    options.add_argument("--sizes", nargs="+", choices=SIZES, default=["1b", "3b"], help="models [1b 3b]")
    options.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="methods [all]")
    options.add_argument("--rounds", type=positive, default=3, help="runs of each method [%(default)s]")
    options.add_argument("--threads", type=positive, default=2, help="CPU threads [%(default)s]")
    options.add_argument("--cpu-time", action="store_true", help="show CPU time (the file has both)")
    options.add_argument("--quick", action="store_true", help="a tiny model and one round")
    options.add_argument("--out", type=out_file, help="JSON file [results/startup.json beside this script]")
    options.add_argument("--worker", choices=METHODS, help=argparse.SUPPRESS)
    args = options.parse_args(argv)
    if args.quick:
        args.sizes, args.rounds = ["tiny"], 1
    if args.out is None:
        args.out = Path("startup_quick.json") if args.quick else RESULTS / "startup.json"
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, Any] | None:
    args = parse(argv)
    if args.worker:
        print(json.dumps(run(args.worker, args.sizes[0], args.threads)))
        return None
    torch.set_num_threads(args.threads)
    clock = "cpu" if args.cpu_time else "wall"
    content: dict[str, Any] = {"environment": environment(CPU), "sizes": {}}
    for size in args.sizes:
        runs: Runs = {method: [] for method in args.methods}
        for _ in tqdm(range(args.rounds), desc=size, unit="round"):
            for method in args.methods:
                runs[method].append(run_alone(method, size, args.threads))
        every = [run for mine in runs.values() for run in mine]
        content["sizes"][size] = {"shape": vars(SIZES[size]), "runs": runs}
        content["sizes"][size] |= {f"{name}_ratios": ratios(runs, name) for name in ("wall", "cpu")}
        write_report(args.out, content)  # at once: what follows may take long
        busy = [run["load_average"] for run in every]
        print(f"\n{size}: {every[0]['parameters']:,} parameters in bf16, {args.threads} threads")
        print(table(rows(runs, clock)))
        one = statistics.median(run["seconds"]["amax pass"][clock] for run in every)
        print(f"{clock} time; one amax pass {one:.3f} s;", end=" ")
        print(f"load average of the machine {min(busy):.1f} to {max(busy):.1f}, where these runs alone make about 1.5")
    print(f"written to {args.out}")
    return content


if __name__ == "__main__":
    main()
