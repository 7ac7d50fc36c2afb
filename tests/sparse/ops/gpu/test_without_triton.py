"""Triton is optional: without it everything imports and PyTorch computes."""

import subprocess
import sys
from types import SimpleNamespace

import torch

from peft_ext.sparse.ops import gpu


def test_without_triton_no_device_is_supported(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert not gpu.triton_supports.__wrapped__(torch.device("cuda"))


def test_an_old_triton_is_left_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for version, supported in (("3.2.0", False), ("3.3.0", True), ("3.10.1+git12", True)):
        monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=version))
        assert gpu.triton_supports.__wrapped__(torch.device("cuda")) == supported


def test_an_old_gpu_is_left_to_pytorch(monkeypatch):
    for major, supported in ((7, False), (8, True), (9, True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, major=major: (major, 0))
        monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.4.0"))
        assert gpu.triton_supports.__wrapped__(torch.device("cuda")) == supported


def test_tensors_of_two_gpus_are_left_to_pytorch_which_refuses_them(monkeypatch):
    monkeypatch.setattr(gpu, "triton_supports", lambda device: True)
    here, there = (SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, device=f"cuda:{n}") for n in range(2))
    assert gpu.usable(here, here)
    assert not gpu.usable(here, there)


def test_the_package_imports_and_computes_without_triton():
    program = """
import sys
sys.modules["triton"] = None
import torch
from peft_ext.sparse.ops import bypass
from peft_ext.sparse.support import Support
support = Support(torch.tensor([[0], [2]], dtype=torch.int32), 3)
out = bypass(torch.zeros(1, 2), torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[10.0], [100.0]]),
             support.indices, None, *support.transposed())
assert out.tolist() == [[10.0, 300.0]], out
"""
    subprocess.run([sys.executable, "-c", program], check=True)
