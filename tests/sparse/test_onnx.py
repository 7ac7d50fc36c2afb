"""ONNX export of unmerged models: the update in standard operators."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_ext import NeuroAdaConfig
from peft_ext.sparse.ops.standard import is_exporting_to_onnx, standard_update


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1, stride=2, groups=2)
        self.linear = nn.Linear(8 * 4, 10)

    def forward(self, x):
        return self.linear(torch.relu(self.conv(x)).flatten(1))


CASES = pytest.mark.parametrize(
    "options", [{}, {"selection": "magnitude_layer"}, {"backend": "bypass", "train_bias": True}], ids=str
)


def adapted(options):
    torch.manual_seed(0)
    model = get_peft_model(Net(), NeuroAdaConfig(k=2, target_modules=["conv", "linear"], **options)).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    return model


X = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))


@CASES
def test_an_exported_graph_has_no_operator_of_ours(options, monkeypatch):
    import torch.onnx._internal.exporter._flags as flags

    model = adapted(options)
    expected = model(X)
    assert not is_exporting_to_onnx()
    monkeypatch.setattr(flags, "_is_onnx_exporting", True)
    assert is_exporting_to_onnx()
    with torch.no_grad():
        program = torch.export.export(model, (X,), strict=False)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [target for target in targets if "peft_ext" in target or "repeat_interleave.Tensor" in target]
    torch.testing.assert_close(program.module()(X), expected, atol=1e-5, rtol=1e-5)


@CASES
@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_onnx(options, dynamo, tmp_path):
    runtime = pytest.importorskip("onnxruntime", reason="needs onnx, onnxscript and onnxruntime")
    pytest.importorskip("onnxscript")
    model = adapted(options)
    torch.onnx.export(model, (X,), tmp_path / "model.onnx", dynamo=dynamo, verbose=False)
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    output = session.run(None, {session.get_inputs()[0].name: X.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(output), model(X).detach(), atol=1e-5, rtol=1e-5)


def test_standard_update_of_a_ragged_support():
    values, indices = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 3, 1], dtype=torch.int32)
    offsets = torch.tensor([0, 0, 2, 2, 3], dtype=torch.int32)  # rows 0 and 2 have no entries
    delta = torch.zeros(4, 5)
    delta[1, 0], delta[1, 3], delta[3, 1] = 1.0, 2.0, 3.0
    x = torch.randn(2, 5)
    result = standard_update(torch.zeros(2, 4), x, values, indices, offsets, 5, None)
    torch.testing.assert_close(result, x @ delta.t())
