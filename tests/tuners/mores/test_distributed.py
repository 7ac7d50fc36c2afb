"""Training by two processes equals training by one on both of their batches."""

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel

from tests._models.vision_language import build, inputs
from tests._processes import fork_server
from tests.contract._common import adapter_bits, assert_equal_bits
from tests.tuners.mores._common import adapted


def _worker(rank, folder, results, kind):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = adapted().train()
    if kind == "fsdp2":
        return _sharded(rank, model, results)
    if rank == 1:  # of another start: the first process's is what counts
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(1.0)
    _train(rank, model, DistributedDataParallel(model))
    torch.save(adapter_bits(model), f"{results}/{rank}.pt")
    dist.destroy_process_group()


def _sharded(rank, model, results):
    """The same under FSDP2, which shards each layer with its steering; then saves the adapter whole."""
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.get_base_model().get_decoder().layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    _train(rank, model, model)
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        model.save_pretrained(f"{results}/adapter", state_dict=whole)
    dist.destroy_process_group()


def _train(rank, model, parallel):
    steps = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2, weight_decay=0.1)
    # In the second step, one process has no image.
    for texts in (((3, 4),), ((3, 4),) if rank == 0 else (None,)):
        batch = inputs(texts=texts)
        batch["input_ids"] = batch["input_ids"] + rank * (batch["input_ids"] < 50)
        parallel(**batch, labels=batch["input_ids"]).loss.backward()
        steps.step()
        steps.zero_grad()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes(kind, tmp_path):
    fork_server()
    start_processes(_worker, (str(tmp_path), str(tmp_path), kind), nprocs=2, start_method="forkserver")
    if kind == "ddp":
        first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
        assert_equal_bits(first, second)
    else:
        first = adapter_bits(PeftModel.from_pretrained(build(), tmp_path / "adapter"))
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
    for name, value in adapter_bits(model).items():
        torch.testing.assert_close(first[name], value, atol=1e-4, rtol=1e-3, msg=name)
