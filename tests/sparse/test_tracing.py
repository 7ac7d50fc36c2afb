"""Adapted models as graphs: `torch.jit.trace`, `torch.export` and ONNX, on other inputs than they were traced with."""

import pytest
import torch
import torch.onnx._internal.exporter._flags as flags
from peft import get_peft_model
from torch import nn

from peft_ext import NeuroAdaConfig
from peft_ext.sparse.ops import BACKENDS
from peft_ext.sparse.ops.standard import is_exporting_to_onnx, standard_update


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(4, 8, 3, padding=1, stride=2, groups=2)
        self.linear = nn.Linear(8 * 4, 10)

    def forward(self, x):
        return self.linear(torch.relu(self.conv(x)).flatten(1))


def adapted(**options):
    config = NeuroAdaConfig(k=2, target_modules=["conv", "linear"], init_weights=False, **options)
    return get_peft_model(Net(), config).eval()


def batch(samples=2):
    return torch.randn(samples, 4, 4, 4)


def traced(model, x):
    return torch.jit.trace(model, x, check_trace=False)


def exported(model, x):
    return torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("samples")},)).module()


@pytest.mark.parametrize("selection", ["random", "random_layer"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", [traced, exported])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_graph_computes_what_the_model_does(make, backend, selection):
    model = adapted(backend=backend, selection=selection)
    with torch.no_grad():
        graph = make(model.base_model.model, batch(3))
        for samples in (3, 4):
            x = batch(samples)
            torch.testing.assert_close(graph(x), model(x))
            with model.disable_adapter():
                assert not torch.allclose(graph(x), model(x))


TO_ONNX = pytest.mark.parametrize(
    "options", [{}, {"selection": "magnitude_layer"}, {"backend": "bypass", "train_bias": True}], ids=str
)


@TO_ONNX
def test_a_graph_for_onnx_has_no_operator_of_ours(options, monkeypatch):
    model, x = adapted(**options), batch()
    expected = model(x)
    assert not is_exporting_to_onnx()
    monkeypatch.setattr(flags, "_is_onnx_exporting", True)
    assert is_exporting_to_onnx()
    with torch.no_grad():
        program = torch.export.export(model, (x,), strict=False)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [target for target in targets if "peft_ext" in target or "repeat_interleave.Tensor" in target]
    torch.testing.assert_close(program.module()(x), expected, atol=1e-5, rtol=1e-5)


@TO_ONNX
@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_onnx(options, dynamo, tmp_path):
    runtime = pytest.importorskip("onnxruntime", reason="needs onnx, onnxscript and onnxruntime")
    pytest.importorskip("onnxscript")
    model, x = adapted(**options), batch()
    torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=dynamo, verbose=False)
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    output = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(output), model(x).detach(), atol=1e-5, rtol=1e-5)


def test_standard_update_of_rows_without_entries():
    values, indices = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 3, 1], dtype=torch.int32)
    offsets = torch.tensor([0, 0, 2, 2, 3], dtype=torch.int32)  # rows 0 and 2 have no entries
    delta = torch.zeros(4, 5)
    delta[1, 0], delta[1, 3], delta[3, 1] = 1.0, 2.0, 3.0
    x = torch.randn(2, 5)
    result = standard_update(torch.zeros(2, 4), x, values, indices, offsets, 5, None)
    torch.testing.assert_close(result, x @ delta.t())
