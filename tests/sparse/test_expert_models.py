"""Shorthands for targets on models of experts, whose routers may be linear layers by class and give tuples."""

from contextlib import nullcontext

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_ext import NeuroAdaConfig
from peft_ext.sparse.bases.neurons import gives_one_output
from peft_ext.sparse.layers import SparseLayer
from tests._models.experts import MODELS, OTHERS, tiny


@pytest.mark.parametrize("target_modules", [None, "all-linear", "all-neurons"])
@pytest.mark.parametrize("name", MODELS | OTHERS)
def test_shorthands_stand_for_every_layer_that_an_update_can_be_added_to(name, target_modules):
    base = tiny(name, num_hidden_layers=2)
    ids = torch.randint(1, 32, (2, 8))
    outputs, handles = {}, []
    for layer, module in base.named_modules():
        if isinstance(module, nn.Linear) and layer != "lm_head":
            handles.append(module.register_forward_hook(lambda m, _, out, layer=layer: outputs.update({layer: out})))
    base(input_ids=ids)
    for handle in handles:
        handle.remove()
    expected = {layer for layer, output in outputs.items() if isinstance(output, torch.Tensor)}
    assert (expected != set(outputs)) == (name in ("llama4_text", "phimoe"))  # whose routers give tuples

    fused = {parameter for parameter, weight in base.named_parameters() if weight.dim() == 3}
    expected |= set() if name == "jetmoe" else fused
    with pytest.warns(UserWarning, match="JetMoeParallelExperts.*is left out") if name == "jetmoe" else nullcontext():
        model = get_peft_model(base, NeuroAdaConfig(k=2, target_modules=target_modules)).train()
    adapted = {layer for layer, m in model.base_model.model.named_modules() if isinstance(m, SparseLayer)}
    assert adapted == expected
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["llama4_text", "phimoe"])
def test_a_router_by_name_is_refused_where_it_gives_a_tuple(name):
    model = get_peft_model(tiny(name), NeuroAdaConfig(target_modules=["router"]))
    with pytest.raises(TypeError, match="Router gives a tuple.*exclude_modules"):
        model(input_ids=torch.ones(1, 4, dtype=torch.long))


class Own(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T + self.bias


class Extended(nn.Linear):
    def forward(self, x):
        return torch.cat((super().forward(x), x), -1)


class Grouped(nn.Linear):
    def forward(self, x):
        return torch.einsum("...gi,gio->...go", x, self.weight.view(3, self.in_features, -1))


class Sequences(nn.Linear):
    def forward(self, x):
        batch, tokens, width = x.shape
        return super().forward(x.view(batch * tokens, width)).view(batch, tokens, -1)


class Noisy(nn.Linear):
    """Changes its input, draws random numbers and keeps what it has seen."""

    def forward(self, x):
        x *= torch.rand_like(x) * torch.rand(()).item()
        self.seen = x
        return super().forward(x).max(-1)


@pytest.mark.parametrize(("kind", "expected"), [(Own, True), (Sequences, True), (Extended, False), (Noisy, False)])
def test_a_layer_is_tried_out_without_a_trace(kind, expected):
    layer = kind(4, 6)
    layer.register_forward_hook(lambda *_: pytest.fail("a hook ran"))
    before, attributes, state = layer.weight, set(vars(layer)), torch.get_rng_state()
    assert gives_one_output(layer) is expected
    assert layer.weight is before and not layer.weight.is_meta and set(vars(layer)) == attributes
    assert torch.equal(torch.get_rng_state(), state)


class ReadsValues(nn.Linear):
    def forward(self, x):
        if not torch.isfinite(x).all():
            raise ValueError("infinite input")
        return super().forward(x)


@pytest.mark.parametrize("kind", [Grouped, ReadsValues])
def test_a_warning_names_what_cannot_be_tried_out(kind):
    with pytest.warns(UserWarning, match=f"{kind.__name__} is left out of the targets.*name it in `target_modules`"):
        assert not gives_one_output(kind(4, 6))


def test_where_no_layer_is_left_the_error_says_so():
    base = tiny("falcon")
    for name, module in list(base.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(base.get_submodule(parent), child, Extended(module.in_features, module.out_features, bias=False))
    with pytest.raises(
        ValueError, match="target_modules=None stands for no layer of FalconForCausalLM.*name the layers"
    ):
        get_peft_model(base, NeuroAdaConfig())
