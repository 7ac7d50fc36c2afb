import importlib.util

import pytest


if importlib.util.find_spec("triton") is None:  # not to be had on this platform
    collect_ignore = [
        "test_expert_kernels.py",
        "test_kernels.py",
        "test_layers.py",
        "test_targets.py",
        "test_tuning.py",
    ]


@pytest.fixture
def on_interpreter():
    """The products of the bypass run through the Triton kernels, on CPU tensors. Value: names of launched kernels."""
    from ._interpreter import interpreted

    with interpreted() as launched:
        yield launched


@pytest.fixture(params=["direct", "columns_first", "staged"])
def kernel(request, on_interpreter, monkeypatch):
    """Both families of kernels in turn, with blocks smaller than the tests' shapes."""
    from peft_ext.sparse.ops.gpu import launch
    from peft_ext.sparse.ops.gpu.tuning import Config

    block_tokens = {"direct": 4, "columns_first": 4, "staged": 0}[request.param]

    def sum_configs(*sizes):
        uneven = sizes[-1]
        block_k = 8 if uneven and request.param == "staged" else 2
        return [Config(block_tokens, 4, block_k, columns_first=request.param == "columns_first")]

    monkeypatch.setattr(launch, "sum_configs", sum_configs)
    monkeypatch.setattr(launch, "TRANSPOSE_BLOCK", 4)
    monkeypatch.setattr(launch, "LIGHT", 2)
    monkeypatch.setattr(launch, "value_configs", lambda *sizes: [Config(block_tokens, 8)])
    return request.param
