"""Adapted models as graphs: `torch.jit.trace` and `torch.export`, on other inputs than they were traced with."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_ext import NeuroAdaConfig
from peft_ext.sparse.ops import BACKENDS


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.conv = nn.Linear(8, 16), nn.Linear(16, 8), nn.Conv1d(8, 8, 3, padding=1)

    def forward(self, x):  # [samples, tokens, 8]
        return self.conv(self.down(torch.tanh(self.up(x))).transpose(1, 2))


def adapted(backend, selection):
    targets = ["up", "down", "conv"]
    config = NeuroAdaConfig(k=2, selection=selection, target_modules=targets, backend=backend, init_weights=False)
    return get_peft_model(Blocks(), config).eval()


def traced(model, x):
    return torch.jit.trace(model, x, check_trace=False)


def exported(model, x):
    return torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("samples")},)).module()


@pytest.mark.parametrize("selection", ["random", "random_layer"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", [traced, exported])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_graph_computes_what_the_model_does(make, backend, selection):
    model = adapted(backend, selection)
    with torch.no_grad():
        graph = make(model.base_model.model, torch.randn(3, 5, 8))
        for samples in (3, 4):
            x = torch.randn(samples, 5, 8)
            torch.testing.assert_close(graph(x), model(x))
            with model.disable_adapter():
                assert not torch.allclose(graph(x), model(x))
