"""Two processes score a half of the data each, and both get the scores of the whole."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from peft_ext import gradient_scores
from tests._processes import fork_server


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def batches():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(6, 4, generator=generator), torch.tensor([0, 1, 2, 2, 1, 0])) for _ in range(4)]


def score_a_half(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    scores = gradient_scores(network(), batches()[rank::2], features=lambda output: output, progress=False)
    torch.save(scores, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_every_process_gets_the_sum(tmp_path):
    fork_server()
    torch.multiprocessing.start_processes(score_a_half, (str(tmp_path),), nprocs=2, start_method="forkserver")
    expected = gradient_scores(network(), batches(), features=lambda output: output)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for name, score in expected.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], score)
