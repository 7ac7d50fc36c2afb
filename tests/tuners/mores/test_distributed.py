"""Training by two processes equals training by one on both of their batches."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from tests.tuners.mores._common import adapted, assert_equal_bits, bits
from tests.tuners.mores._models import inputs


def _worker(rank, folder, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = adapted().train()
    if rank == 1:  # of another start: the first process's is what counts
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(1.0)
    parallel = DistributedDataParallel(model)
    steps = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2, weight_decay=0.1)
    # In the second step, one process has no image.
    for texts in (((3, 4),), ((3, 4),) if rank == 0 else (None,)):
        batch = inputs(texts=texts)
        batch["input_ids"] = batch["input_ids"] + rank * (batch["input_ids"] < 50)
        parallel(**batch, labels=batch["input_ids"]).loss.backward()
        steps.step()
        steps.zero_grad()
    torch.save(bits(model), f"{results}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes(tmp_path):
    mp.start_processes(_worker, (str(tmp_path), str(tmp_path)), nprocs=2, start_method="spawn")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert_equal_bits(first, second)
    model = adapted().train()
    steps = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2, weight_decay=0.1)
    for step in range(2):
        for rank in (0, 1):
            batch = inputs(texts=((3, 4),) if rank == 0 or step == 0 else (None,))
            batch["input_ids"] = batch["input_ids"] + rank * (batch["input_ids"] < 50)
            loss = model(**batch, labels=batch["input_ids"]).loss
            if loss.requires_grad:
                (loss / 2).backward()
        steps.step()
        steps.zero_grad()
    for name, value in bits(model).items():
        torch.testing.assert_close(first[name], value, atol=1e-4, rtol=1e-3, msg=name)
