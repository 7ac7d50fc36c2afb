"""Triton is optional: without it everything imports and PyTorch computes."""

import shutil
import sys
import sysconfig
import warnings
from types import SimpleNamespace

import pytest
import torch

from peft_ext.sparse.ops import gpu


_launcher_lacks = gpu.launcher_lacks


@pytest.fixture(autouse=True)
def _afresh(monkeypatch):
    """Nothing remembered, and all that Triton needs to launch."""
    gpu.can_launch.cache_clear()
    monkeypatch.setattr(gpu, "launcher_lacks", lambda: None)
    yield
    gpu.can_launch.cache_clear()


@pytest.mark.parametrize(
    ("version", "capability", "supported"),
    [
        (None, 9, False),
        ("3.2.0", 9, False),
        ("3.3.0", 9, True),
        ("3.10.1+git12", 9, True),
        ("3.4.0", 7, False),
        ("3.4.0", 8, True),
    ],
)
def test_an_old_triton_or_gpu_is_left_to_pytorch(monkeypatch, version, capability, supported):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))
    monkeypatch.setitem(sys.modules, "triton", version and SimpleNamespace(__version__=version))
    assert gpu.triton_supports.__wrapped__(torch.device("cuda")) == supported


def test_tensors_of_two_gpus_are_left_to_pytorch_which_refuses_them(monkeypatch):
    monkeypatch.setattr(gpu, "triton_supports", lambda device: True)
    here, there = (SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, device=f"cuda:{n}") for n in range(2))
    assert gpu.usable(here, here)
    assert not gpu.usable(here, there)


def test_a_launcher_that_cannot_be_built_is_left_alone_with_one_warning(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.4.0"))
    monkeypatch.setattr(gpu, "launcher_lacks", lambda: "a C compiler: install gcc")
    with pytest.warns(UserWarning, match="PyTorch's slower operators.*without a C compiler: install gcc"):
        assert not gpu.triton_supports.__wrapped__(torch.device("cuda:0"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not gpu.triton_supports.__wrapped__(torch.device("cuda:1"))


@pytest.mark.parametrize(
    ("found", "variable", "headers", "lacking"),
    [
        ({"gcc"}, None, True, None),
        ({"clang"}, None, True, None),
        ({"/opt/cc"}, "/opt/cc", True, None),
        (set(), None, True, "install gcc or clang"),
        ({"cc", "c++"}, None, True, "install gcc or clang"),
        ({"gcc"}, "icc", True, "CC names, 'icc'"),
        ({"gcc"}, "", True, "CC names, ''"),
        ({"gcc"}, None, False, "python3-dev"),
    ],
)
def test_what_triton_builds_its_launcher_with(monkeypatch, tmp_path, found, variable, headers, lacking):
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.4.0"))
    monkeypatch.setattr(shutil, "which", lambda name: name if name in found else None)
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    if headers:
        (tmp_path / "Python.h").touch()
    monkeypatch.delenv("CC", raising=False)
    if variable is not None:
        monkeypatch.setenv("CC", variable)
    said = _launcher_lacks()
    assert (said is None) if lacking is None else (lacking in said)


def test_a_way_to_build_of_the_users_own_needs_no_compiler(monkeypatch):
    knobs = SimpleNamespace(build=SimpleNamespace(impl=print))
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.4.0", knobs=knobs))
    monkeypatch.setenv("CC", "not to be found")
    assert _launcher_lacks() is None
