"""Nothing in the bypass waits for a device or makes shapes from data, so that CUDA graphs can capture it."""

import importlib.util

import pytest
import torch

from peft_ext.sparse.ops import gpu
from peft_ext.sparse.support import Support

from .._inputs import SHAPES, adapt, make_inputs, random_linear
from .._probes import InsideOps
from ._paths import PATHS


# They read a number back from the device, or make a tensor whose size depends on one.
WAITING = {
    f"aten::{name}"
    for name in (
        "_local_scalar_dense", "bincount", "equal", "is_nonzero", "item", "masked_select", "nonzero", "nonzero_numpy",
        "_unique", "_unique2", "unique_consecutive", "unique_dim",
    )
}  # fmt: skip


class NoWaiting(InsideOps):
    """Fails at an operator that a CUDA graph can't capture; looks inside our operators."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def meet(self, func, args, kwargs):
        name = func._schema.name
        self.seen.add(name)
        assert name not in WAITING, f"{name} waits for the device"
        if func is torch.ops.aten.repeat_interleave.Tensor:
            assert kwargs.get("output_size") is not None, "repeat_interleave reads its size back"
        if name == "aten::index":
            assert not any(index is not None and index.dtype == torch.bool for index in args[1]), "a mask as index"


def _step(path, inputs, monkeypatch):
    """Forward and backward, watched. Layers make the transposed table once, before."""
    transposed = inputs.support.transposed()
    monkeypatch.setattr(Support, "transposed", lambda self: transposed)
    with NoWaiting() as mode:
        out = PATHS[path](inputs.x, inputs.weight, inputs.bias, inputs.values, inputs.support)
        torch.autograd.grad(out, (inputs.x, inputs.values), inputs.grad)
    return mode.seen


@pytest.mark.parametrize("shape", ["k1", "k2", "k2 one token", "ragged", "k20"])
@pytest.mark.parametrize("path", ["bypass", "folded", "dense"])
def test_no_operator_waits_for_the_device(monkeypatch, path, shape):
    seen = _step(path, make_inputs(SHAPES[shape], torch.float32), monkeypatch)
    assert {"bypass": "peft_ext::sparse_grad_values", "folded": "peft_ext::sparse_grad_values",
            "dense": "peft_ext::dense_grad_values"}[path] in seen  # fmt: skip


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("shape", ["k1", "k2", "ragged"])
def test_launching_the_kernels_waits_for_nothing(monkeypatch, shape):
    """The host's side of them: the launches themselves are counted and not made."""
    from triton.runtime.jit import JITFunction

    launched = []
    monkeypatch.setattr(gpu, "usable", lambda *tensors: True)
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **options: launched.append(self.__name__))
    seen = _step("bypass", make_inputs(SHAPES[shape], torch.float32), monkeypatch)
    assert launched == ["gather_sum", "gather_sum", "grad_values"]
    assert "peft_ext::bypass_product" in seen


@pytest.mark.parametrize("offence", [lambda t: t.nonzero(), lambda t: t[t > 0], lambda t: t.sum().item()])
def test_the_mode_notices_an_offence(offence):
    with NoWaiting(), pytest.raises(AssertionError):
        offence(torch.ones(3))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("k", [1, 20])
def test_a_captured_step_replays(k):
    layer = adapt(random_linear(256, 512, dtype=torch.bfloat16), k=k).cuda()
    x = torch.randn(64, 256, device="cuda").to(torch.bfloat16).requires_grad_()
    values = layer.deltas["default"].weight

    def step():
        out = layer(x)
        return out, *torch.autograd.grad(out.float().square().sum(), (x, values))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(torch.randn(64, 256))
    graph.replay()
    for replayed, eager in zip(captured, step(), strict=True):
        assert torch.equal(replayed, eager)
