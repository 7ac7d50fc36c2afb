"""FSDP in CPU processes. accelerate makes it of accelerators only, and trains with DistributedDataParallel on CPUs.

Importing this changes that. `-m tests.distributed._fsdp_on_cpu SCRIPT ARGUMENTS` runs a script with a `Trainer` so.
"""

import os
import runpy
import sys

import torch
import torch.distributed.fsdp as fsdp
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from transformers import Trainer


def _as_if_on_gpus(trainer):
    """Say to accelerate that these processes are on GPUs, and take it back."""
    wanted = trainer.args.fsdp or os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if wanted:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    _create(trainer)
    if wanted:
        assert trainer.accelerator.distributed_type == DistributedType.FSDP
        trainer.accelerator.state.device = torch.device("cpu")


def _without_offload(offload_to_cpu, rank0_only):
    """Moving tensors that are on the CPU to the CPU crashes FSDP1 of torch 2.13, for every method."""
    return _FullStateDictConfig(rank0_only=rank0_only)


_create, Trainer.create_accelerator_and_postprocess = Trainer.create_accelerator_and_postprocess, _as_if_on_gpus
_FullStateDictConfig, fsdp.FullStateDictConfig = fsdp.FullStateDictConfig, _without_offload


if __name__ == "__main__":
    os.environ["FSDP_SYNC_MODULE_STATES"] = "false"  # accelerate looks for an accelerator to send them by
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
