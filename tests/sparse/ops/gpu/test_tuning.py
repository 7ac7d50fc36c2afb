"""Which configuration runs: the fastest, measured once per kind of call and never where that would do harm."""

import pytest
import torch
from triton.runtime.errors import OutOfResources

from peft_ext.sparse.ops import add_in_place
from peft_ext.sparse.ops.bypass import bypass
from peft_ext.sparse.ops.gpu import launch, tuning
from peft_ext.sparse.ops.gpu.tuning import Config

from ..._inputs import Shape
from ._cases import Case, assert_rounded_once


CPU = torch.device("cpu")
CONFIGS = [Config(4, 16), Config(8, 16), Config(0, 16)]
FLOAT = (torch.float32,) * 3


@pytest.fixture
def measured(monkeypatch):
    """As if a device could be timed: it runs the work three times, the second configuration is the fastest. Value: how
    often something was timed."""
    timed = []

    def milliseconds(do, device):
        for _ in range(3):
            do()
        timed.append(do)
        return 1.0 if len(timed) % 3 == 2 else 2.0

    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(tuning, "can_measure", lambda device: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(tuning, "milliseconds", milliseconds)
    return timed


def _choice(key, device=CPU, ran=None):
    work = (lambda config: None) if ran is None else ran.append
    return tuning.choice(key, lambda: CONFIGS, device, lambda: work)


def test_the_fastest_is_measured_once_per_key(measured):
    ran = []
    assert _choice("a", ran=ran) == CONFIGS[1]
    assert set(ran) == set(CONFIGS)
    assert _choice("a") == CONFIGS[1] and len(measured) == 3
    assert _choice("b") == CONFIGS[1] and len(measured) == 6


def test_deterministic_algorithms_take_the_first_whatever_was_measured(measured):
    _choice("a")
    torch.use_deterministic_algorithms(True)
    try:
        assert _choice("a") == CONFIGS[0] and _choice("b") == CONFIGS[0]
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(measured) == 3


def test_what_a_graph_captured_first_also_runs_outside_of_it(measured, monkeypatch):
    capturing = True
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    assert _choice("a") == CONFIGS[0]
    capturing = False
    assert _choice("a") == CONFIGS[0] and measured == []
    assert _choice("b") == CONFIGS[1]
    capturing = True
    assert _choice("b") == CONFIGS[1]


def test_a_cpu_is_not_measured():
    assert _choice("unseen") == CONFIGS[0] and "unseen" not in tuning._chosen


def _out_of_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("trial", [_out_of_memory, lambda: _out_of_memory], ids=["output", "launch"])
def test_where_memory_is_short_the_first_runs_and_a_later_call_measures(measured, trial):
    assert tuning.choice("a", lambda: CONFIGS, CPU, trial) == CONFIGS[0]
    assert measured == []
    assert _choice("a") == CONFIGS[1]


def test_what_the_device_refuses_drops_out():
    def time(do):
        do()
        return 1.0

    def launch(config):
        if config != CONFIGS[2]:
            raise OutOfResources(300_000, 232_448, "shared memory")

    assert tuning.fastest(CONFIGS, launch, time) == CONFIGS[2]


@pytest.mark.parametrize(("tokens", "others"), [(1, [1]), (100, [17, 128]), (1000, [129, 1024]), (10**6, [8193])])
def test_lengths_of_a_bucket_share_a_choice(tokens, others):
    assert {tuning.bucket(other) for other in others} == {tuning.bucket(tokens)}
    assert tuning.bucket(max(1, min(others) - 1)) != tuning.bucket(tokens) or tokens == 1


@pytest.mark.usefixtures("on_interpreter")
def test_measuring_leaves_no_trace_on_the_output(measured):
    case = Case.draw(Shape((9,), 9, 6, 2), FLOAT, "contiguous")
    exact = case.expected()["output"]
    out = bypass(case.result.detach(), case.x.detach(), case.values.detach(), *case.support_tensors())
    assert_rounded_once(out, *exact, torch.float32)
    tuning._chosen.clear()
    with torch.no_grad():
        added = add_in_place(case.result.detach().clone(), case.x, case.values, *case.support_tensors())
    assert_rounded_once(added, *exact, torch.float32)
    assert len(measured) > 3


@pytest.mark.parametrize("tokens", [1, 2, 31, 32, 1024, 8192, 8193, 10**6])
@pytest.mark.parametrize("entries", [1, 1024, 4096, 14336, 20 * 14336, 512 * 128256])
def test_parts_of_a_value_gradient_cover_the_tokens_in_little_memory(tokens, entries):
    parts, span = launch.splits_of(tokens, entries)
    assert (parts - 1) * span < tokens <= parts * span
    assert span % 16 == 0  # whole blocks, and whole words of staged tokens
    assert parts == 1 or 4 * parts * entries <= 16 * 2**20 + 4 * entries


@pytest.mark.parametrize(("version", "staged"), [((3, 3), False), ((3, 4), True), ((3, 10), True)])
def test_rows_are_staged_where_triton_compiles_that_well(monkeypatch, version, staged):
    monkeypatch.setattr(launch, "triton_version", lambda: version)
    sums = [launch.sum_configs(1024, 4096, 4096, 1, 2, uneven) for uneven in (False, True)]
    for configs in (*sums, launch.value_configs(1024, 4096, 4096, 2)):
        assert any(config.staged for config in configs) == staged


@pytest.mark.parametrize("tokens", [1, 3, 5, 10**6])
@pytest.mark.parametrize("k", [1, 2, 20, 512])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_candidates_are_few_and_fit_any_width(tokens, k, itemsize):
    for width in (1, 4096, 14336, 16385, 10**6):
        for neurons in (1, 1000, 128256):
            for configs in (
                launch.sum_configs(tokens, neurons, width, k, itemsize, False),
                launch.sum_configs(tokens, neurons, width, k, itemsize, True),
                launch.value_configs(tokens, neurons * k, width, itemsize),
            ):
                assert 1 <= len(configs) == len(set(configs)) <= 5
                assert not configs[0].staged
                assert width <= launch.MAX_STAGED_WIDTH or not any(config.staged for config in configs)
                assert all(config.staged or launch.LIGHT % config.block_k == 0 for config in configs)
                assert all(config.staged or launch.light_of(config, k) % config.block_k == 0 for config in configs)
                programs = max(tokens * neurons / (max(1, c.block_tokens) * c.block_neurons) for c in configs)
                assert programs < 2**31  # what a grid may have
