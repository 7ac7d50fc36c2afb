"""The step benchmark at toy sizes: what it compares is what it says, and what it counts is right."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peft_ext.sparse import delta
from peft_ext.sparse.ops import bypass


BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"
CPU = torch.device("cpu")
TINY = ["--hidden", "32", "--intermediate", "48", "--layers", "1", "--heads", "2", "--vocab", "64", "--tokens", "8"]
TINY += ["--batch", "2", "--layer", "64", "--steps", "2", "--warmup", "1", "--threads", "1"]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The benchmark's modules, imported as the script imports them."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    # Saved and restored by hand: main sets the thread count for the process.
    threads = torch.get_num_threads()
    names = ("gate", "memory", "methods", "models", "steps")
    modules = {name: importlib.import_module(f"_common.{name}") for name in names}
    yield SimpleNamespace(step=importlib.import_module("step"), **modules)
    torch.set_num_threads(threads)
    for name in [name for name in sys.modules if name in ("step", "ops") or name.partition(".")[0] == "_common"]:
        del sys.modules[name]


@pytest.fixture
def tiny(bench: SimpleNamespace) -> tuple[nn.Module, dict[str, Tensor]]:
    shape = bench.models.Shape(hidden=32, intermediate=48, layers=2, heads=2, vocab=64, batch=2, tokens=8)
    return bench.models.llama(shape, torch.float32, CPU), bench.models.token_batch(shape, CPU)


def build(bench: SimpleNamespace, base: nn.Module, name: str) -> tuple[Any, nn.Module]:
    method = bench.methods.Method.parse(name)
    return method, bench.methods.adapt(base, method, bench.models.LINEARS)


def test_report_and_table_hold_every_method_with_its_raw_times(
    bench: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results.json"
    bench.step.main([*TINY, "--out", str(out)])
    report, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert list(report["results"]) == list(bench.step.METHODS)
    for name, result in report["results"].items():
        assert len(result["times"]) == 2
        assert set(result["ratios"]) == {"lora-r8", "frozen", "shira-k20", "supertuning-k20"}
        assert sum(line.split()[:1] == [name] for line in printed.splitlines()) == 2  # in both tables
    assert all(check["output"] <= check["tolerance"] for check in report["gate"])


def test_published_sizes_a_part_of_their_depth_and_what_is_passed(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    args = bench.step.parse(["--preset", "llama-3-8b", "--layers", "2", "--device", "cuda"])
    assert (args.hidden, args.intermediate, args.layers, args.heads, args.kv_heads) == (4096, 14336, 2, 32, 8)
    assert args.solo == ["masked-k20", "full"]
    assert bench.step.parse([]).solo == []


def test_solo_and_checkpointed_steps_are_reported_like_the_others(bench: SimpleNamespace, tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    methods = ["frozen", "neuroada-k1", "lora-r8", "masked-k1", "full"]
    arguments = [*TINY, "--kv-heads", "1", "--methods", *methods, "--solo", "masked-k1", "full", "--checkpointing"]
    bench.step.main([*arguments, "--out", str(out)])
    report = json.loads(out.read_text())
    assert list(report["results"]) == methods and report["checkpointing"] and report["out_of_memory"] == []
    assert report["results"]["full"]["ratios"].keys() == {"lora-r8", "frozen"}
    resident = {name: result["resident_bytes"] for name, result in report["results"].items()}
    assert resident["frozen"] < resident["neuroada-k1"] < resident["masked-k1"]  # its masks count


def test_a_method_without_the_memory_for_a_step_is_left_out(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    adapt = bench.step.adapt

    def adapt_or_fail(base: nn.Module, method: Any, targets: Any) -> nn.Module:
        if method.kind == "full":
            raise torch.OutOfMemoryError
        return adapt(base, method, targets)

    monkeypatch.setattr(bench.step, "adapt", adapt_or_fail)
    report = bench.step.main([*TINY, "--methods", "frozen", "full", "lora-r8"])
    assert list(report["results"]) == ["frozen", "lora-r8"] and report["out_of_memory"] == ["full"]
    assert "Out of memory: full." in capsys.readouterr().out


@pytest.mark.parametrize("backend", ["bypass", "folded"])
def test_neuroada_allocates_no_tensor_of_the_weights_size(bench: SimpleNamespace, backend: str) -> None:
    sizes = {
        name: bench.step.layer_memory(bench.methods.Method.parse(name), 256, torch.float32, CPU)
        for name in (f"neuroada-k1@{backend}", "supertuning-k1", "lora-r8")
    }
    counts = {name: size["layer_weight_sized_allocations"] for name, size in sizes.items()}
    assert counts[f"neuroada-k1@{backend}"] == 0
    assert counts["supertuning-k1"] >= 2  # the composed weight and its gradient: the counter does see them
    assert sizes[f"neuroada-k1@{backend}"]["layer_saved_bytes"] <= sizes["lora-r8"]["layer_saved_bytes"]


def test_nothing_is_timed_when_a_gradient_is_wrong(
    bench: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = bench.gate.sparse_product
    monkeypatch.setattr(bench.gate, "sparse_product", lambda x, w, b, values, i: right(x, w, b, 1.01 * values, i))
    monkeypatch.setattr(bench.step, "interleave", lambda *args: pytest.fail("timed in spite of the gate"))
    with pytest.raises(bench.gate.GateError, match="'case': 'layer', 'backend': 'bypass', 'k': 1"):
        bench.step.main([*TINY, "--out", str(tmp_path / "results.json")])
    assert not any(tmp_path.iterdir())


def test_the_gate_checks_the_path_that_is_timed_and_not_one_that_a_watching_mode_leads_to(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delta, "may_add_in_place", lambda *args: not torch._C._len_torch_dispatch_stack())
    monkeypatch.setattr(delta, "add_in_place", lambda result, *args: 1.01 * bypass(result, *args))
    shape = bench.models.Shape(hidden=32, intermediate=48, layers=1, heads=2, vocab=64, batch=2, tokens=8)
    checks = bench.gate.gate(shape, torch.float32, CPU)
    assert all(check.backend_ran for check in checks)
    assert {check.backend for check in checks if not check.passed} == {"bypass"}


def test_steps_on_a_gpu_that_is_not_the_current_one_are_timed_on_its_stream(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.synchronize = lambda: None
            self.record = recorded.append
            self.elapsed_time = lambda end: 2000.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    device = torch.device("cuda:1")
    assert bench.steps.seconds(lambda: None, device) == 2.0
    assert recorded == ["stream of cuda:1"] * 2


@pytest.mark.parametrize("flaw", [{"output": float("nan")}, {"base_intact": False}, {"backend_ran": False}])
def test_a_check_fails_for_each_single_flaw(bench: SimpleNamespace, flaw: dict[str, Any]) -> None:
    fields = dict.fromkeys(("output", "values_gradient", "input_gradient"), 0.0)
    perfect = dict(fields, case="layer", backend="folded", k=1, base_intact=True, backend_ran=True, tolerance=1e-4)
    assert bench.gate.Check(**perfect).passed
    assert not bench.gate.Check(**{**perfect, **flaw}).passed


def test_pair_ratio_is_the_median_within_rounds(bench: SimpleNamespace) -> None:
    # The machine is ten times slower in the last two rounds; the ratio of the medians would be 10 or 0.3.
    spread = bench.steps.pair_ratio([3.0, 2.0, 20.0, 30.0, 2.0], [1.0, 1.0, 10.0, 10.0, 1.0])
    assert spread == bench.steps.Spread(median=2.0, lower=2.0, upper=3.0)


def test_interleaving_drops_warmup_and_takes_each_method_once_per_round(bench: SimpleNamespace) -> None:
    calls: list[str] = []
    steppers = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    times = bench.steps.interleave(steppers, rounds=8, warmup=2, device=CPU)
    rounds = ["".join(calls[i : i + 3]) for i in range(0, 30, 3)]
    assert all(sorted(each) == list("abc") for each in rounds) and len(set(rounds)) > 1
    assert {name: len(sample) for name, sample in times.items()} == {"a": 8, "b": 8, "c": 8}


@pytest.mark.parametrize("name", ["frozen", "frozen-inputs", "neuroada-k2", "lora-r2", "shira-k2", "supertuning-k2"])
def test_methods_with_a_frozen_base_share_it_and_leave_every_bit(
    bench: SimpleNamespace, tiny: tuple[nn.Module, dict[str, Tensor]], name: str
) -> None:
    base, batch = tiny
    before = {key: value.clone() for key, value in base.state_dict().items()}
    _, model = build(bench, base, name)
    addresses = {p.data_ptr() for p in model.parameters()}
    assert {p.data_ptr() for p in base.parameters()} <= addresses
    stepper = bench.steps.Stepper(model, batch)
    for _ in range(2):
        stepper()
    assert all(torch.equal(before[key], value) for key, value in base.state_dict().items())


def test_masked_training_moves_the_support_and_nothing_else(
    bench: SimpleNamespace, tiny: tuple[nn.Module, dict[str, Tensor]]
) -> None:
    base, batch = tiny
    method, model = build(bench, base, "masked-k2")
    stepper = bench.steps.Stepper(model, batch)
    for _ in range(3):
        stepper()
    moved = 0
    for (name, old), new in zip(base.named_parameters(), model.parameters(), strict=True):
        change = old != new
        moved += int(change.sum())
        if change.any():
            support = torch.zeros_like(change).scatter_(1, old.abs().topk(2, dim=1).indices, True)
            assert not (change & ~support).any(), name
    assert 0 < moved <= bench.methods.trained_parameters(model, method)
    assert moved > 0.9 * bench.methods.trained_parameters(model, method)


def test_sparse_peers_train_as_many_parameters_as_neuroada(
    bench: SimpleNamespace, tiny: tuple[nn.Module, dict[str, Tensor]]
) -> None:
    base, _ = tiny
    counts = {
        name: bench.methods.trained_parameters(model, method)
        for name in ("neuroada-k5", "shira-k5", "supertuning-k5", "masked-k5")
        for method, model in [build(bench, base, name)]
    }
    linears = list(bench.methods.targeted(base, bench.models.LINEARS))
    step_of_shira = sum(linear.in_features + linear.out_features for linear in linears)
    budget = 5 * sum(linear.out_features for linear in linears)
    assert counts["neuroada-k5"] == counts["masked-k5"] == budget
    assert abs(counts["shira-k5"] - budget) <= step_of_shira / 2
    assert 0 <= budget - counts["supertuning-k5"] <= len(linears)  # rounded down in each weight


def test_the_limit_computes_no_input_gradient_before_the_first_adapted_linear(
    bench: SimpleNamespace, tiny: tuple[nn.Module, dict[str, Tensor]]
) -> None:
    def products(name: str) -> int:
        _, model = build(bench, tiny[0], name)
        with torch.profiler.profile() as profiler:
            bench.steps.Stepper(model, tiny[1])()
        return sum(event.count for event in profiler.key_averages() if event.key == "aten::mm")

    # q, k and v of the first block are all that tells the two limits apart.
    assert products("frozen-inputs") - products("frozen") == 3


def test_saved_bytes_counts_each_storage_once_and_no_parameter(bench: SimpleNamespace) -> None:
    layer = nn.Linear(8, 16, bias=False)
    x = torch.randn(4, 8, requires_grad=True)

    def forward() -> Tensor:
        out = layer(x)  # saves x and the weight
        return (out.sigmoid() * out.sigmoid()).sum()  # saves two sigmoids, each for itself and for the product

    assert bench.memory.saved_bytes(layer, forward) == 4 * (x.numel() + 2 * 4 * 16)


def test_peak_is_the_most_that_lives_at_once(bench: SimpleNamespace) -> None:
    def work() -> None:
        kept = torch.empty(1000, dtype=torch.uint8)
        torch.empty(5000, dtype=torch.uint8)  # freed at once
        torch.empty(3000, dtype=torch.uint8)
        del kept

    assert bench.memory.peak_bytes(work, CPU) == 6000


@pytest.mark.parametrize(
    "name", ["neuroada", "neuroada-r1", "lora-k8", "lora-r8@folded", "full-k1", "lora-r0", "dora-r8"]
)
def test_unknown_methods_are_named_in_the_error(bench: SimpleNamespace, name: str) -> None:
    with pytest.raises(ValueError, match=f"`methods` contains '{name}'"):
        bench.methods.Method.parse(name)
