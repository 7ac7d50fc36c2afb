"""Two processes over gloo train what one does."""

from importlib.util import find_spec

import pytest
import torch

from tests._processes import results_of
from tests.mtl._distributed import train
from tests.mtl._visual import assert_same, samples


pytestmark = pytest.mark.slow

CASES = [
    {"mtl_method": "pcgrad"},
    {"mtl_method": "joint", "conflict_logging_steps": 2},
    {"mtl_method": "joint", "conflict_logging_steps": 0, "missing": True},
    {"mtl_method": "famo", "missing": True},
    {"mtl_method": "graddrop", "split": True, "task_sampling": "proportional"},
    {"mtl_method": "cagrad", "shard": True},
    {"mtl_method": "nash_mtl", "shard": True, "split": True, "task_sampling": "proportional"},
    {"mtl_method": "graddrop", "shard": True},
]


VISUAL = [
    {"layout": "llava", "batch": 3},
    {"layout": "llava", "batch": 1},
    {"layout": "qwen", "batch": 1, "average_tokens_across_devices": False},
]
TEXTS = [{"sft": True, "mtl_method": "pcgrad"}] if find_spec("trl") and find_spec("datasets") else []


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    one = [[train(folder / "one", dict(case)) for case in CASES + TEXTS]]
    return one, results_of("tests.mtl._distributed", folder / "two", 2, CASES + TEXTS + VISUAL)


@pytest.mark.parametrize("case", range(len(CASES) - 1), ids=lambda i: "-".join(str(v) for v in CASES[i].values()))
def test_two_processes_are_one(results, case):
    (one,), two = [[process[case] for process in processes] for processes in results]
    assert "error" not in two[0], two[0]
    assert two[0]["sharded"] == CASES[case].get("shard", False)
    for name, weight in one["weights"].items():
        assert torch.equal(two[0]["weights"][name], two[1]["weights"][name]), name
        torch.testing.assert_close(two[0]["weights"][name], weight, rtol=0, atol=2e-6)
    assert two[0]["evaluation"] == two[1]["evaluation"] == pytest.approx(one["evaluation"], abs=1e-5)
    torch.testing.assert_close(two[0]["cosines"], one["cosines"], rtol=0, atol=1e-5, equal_nan=True)


def test_methods_that_need_whole_gradients_say_so_when_sharded(results):
    assert "needs whole gradients" in results[1][0][len(CASES) - 1]["error"]


@pytest.mark.parametrize("case", range(len(VISUAL)), ids=lambda i: "-".join(str(v) for v in VISUAL[i].values()))
def test_images_stay_with_their_samples(results, case):
    rows = samples(VISUAL[case]["layout"], 6)
    for process in results[1]:
        assert_same(process[case - len(VISUAL)], VISUAL[case]["layout"], rows, rows[:5])


@pytest.mark.skipif(not TEXTS, reason="trl or datasets is not installed: pip install 'peft-ext[trl]'")
def test_texts_count_once_in_two_processes(results):
    (one,), two = [[process[len(CASES)] for process in processes] for processes in results]
    for found in two:
        assert found["tokens"] == one["tokens"]
        for key in ("accuracy", "evaluation", "weights"):
            torch.testing.assert_close(found[key], one[key], rtol=0, atol=1e-5)
