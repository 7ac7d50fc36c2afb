"""Two processes over gloo train what one does."""

import pytest
import torch

from tests.mtl._distributed import launch


pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "options",
    [
        {"mtl_method": "pcgrad"},
        {"mtl_method": "joint", "conflict_logging_steps": 2},
        {"mtl_method": "famo", "missing": True},
        {"mtl_method": "graddrop", "split": True, "task_sampling": "proportional"},
        {"mtl_method": "cagrad", "shard": True},
        {"mtl_method": "nash_mtl", "shard": True, "split": True, "task_sampling": "proportional"},
    ],
    ids=lambda options: "-".join(str(v) for v in options.values()),
)
def test_two_processes_are_one(tmp_path, options):
    (one,) = launch(tmp_path / "one", 1, **options)
    two = launch(tmp_path / "two", 2, **options)
    assert two[0]["sharded"] == options.get("shard", False)
    for name, weight in one["weights"].items():
        assert torch.equal(two[0]["weights"][name], two[1]["weights"][name]), name
        torch.testing.assert_close(two[0]["weights"][name], weight, rtol=0, atol=2e-6)
    torch.testing.assert_close(two[0]["cosines"], one["cosines"], rtol=0, atol=1e-5, equal_nan=True)


def test_methods_that_need_whole_gradients_say_so_when_sharded(tmp_path):
    with pytest.raises(AssertionError, match="needs whole gradients"):
        launch(tmp_path, 2, mtl_method="graddrop", shard=True)
