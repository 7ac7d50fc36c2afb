"""Circumstances in which adapted experts run: routing, dtypes, checkpointing, compilation, and what they cost."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from peft_ext import NeuroAdaConfig
from peft_ext.sparse.bases.bank_product import run_with
from peft_ext.sparse.bases.experts import ExpertBank
from tests._models.experts import COLUMNS, IMPLEMENTATIONS, adapted, fill, layers_of, run, tiny, token_ids

from .._probes import LargestAllocation
from .test_dense_reference import assert_equals_dense


IDS = token_ids()
EACH_LAYOUT = pytest.mark.parametrize("name", ["mixtral", *COLUMNS])
EACH_IMPLEMENTATION = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


class Alone(nn.Module):
    """Experts with a given routing."""

    def __init__(self, implementation, hidden=16, intermediate=24, experts=4):
        super().__init__()
        config = MixtralConfig(hidden_size=hidden, intermediate_size=intermediate, num_local_experts=experts)
        config._experts_implementation_internal = implementation
        self.experts = MixtralExperts(config)
        for seed, parameter in enumerate(self.parameters()):
            parameter.data.normal_(std=0.4, generator=torch.Generator().manual_seed(seed))

    def forward(self, x, index, weights):
        return self.experts(x, index, weights)


def alone(implementation, k=2, **options):
    return fill(get_peft_model(Alone(implementation, **options), NeuroAdaConfig(k=k, target_modules=["experts"])))


def routed(index, hidden=16):
    index = torch.tensor(index)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(index), hidden, generator=generator).requires_grad_()
    return x, index, torch.rand(index.shape, generator=generator).requires_grad_()


def _dense_experts(model, x, index, weights):
    """Token by token, with the updates in the weights."""
    base = model.base_model.model.experts.base_layer
    layers = model.base_model.model.experts.parts
    names = ("gate_up_proj", "down_proj")
    up, down = (getattr(base, name).detach() + layers[name].get_delta_weight("default") for name in names)
    rows = []
    for token, experts, shares in zip(x, index.tolist(), weights, strict=True):
        outputs = []
        for expert, share in zip(experts, shares, strict=True):
            gate, value = (up[expert] @ token).chunk(2)
            outputs.append(share * (down[expert] @ (torch.nn.functional.silu(gate) * value)))
        rows.append(sum(outputs))
    return torch.stack(rows)


@EACH_IMPLEMENTATION
@pytest.mark.parametrize(
    "index",
    [[[0, 2], [2, 0], [2, 3]], [[1, 3]], [[3, 3]] * 5, [[2, 0]] * 300],
    ids=["some without tokens", "one token", "all on one", "many on two"],
)
def test_routing(implementation, index):
    model = alone(implementation)
    inputs = routed(index)
    results = []
    for compute in (model, lambda *args: _dense_experts(model, *args)):
        y = compute(*inputs)
        gradients = torch.autograd.grad(y, [inputs[0], inputs[2]], torch.ones_like(y))
        results.append((y, *gradients))
    for ours, dense in zip(*results, strict=True):
        torch.testing.assert_close(ours, dense, atol=1e-5, rtol=1e-4)
    model(*inputs).sum().backward()
    for layer in layers_of(model).values():
        has_gradient = layer.deltas["default"].weight.grad.view(4, -1).any(1).tolist()
        assert has_gradient == [expert in inputs[1] for expert in range(4)]


@EACH_IMPLEMENTATION
def test_autocast(implementation):
    model = adapted(implementation=implementation)
    exact = run(model, input_ids=IDS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(input_ids=IDS, labels=IDS).loss
        rough = run(model, input_ids=IDS)
    loss.backward()
    assert (rough - exact).norm() < 0.1 * exact.norm()
    assert all(bool(p.grad.any()) for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("use_reentrant", [False, True])
@EACH_LAYOUT
def test_checkpointing(name, use_reentrant):
    model = adapted(name)
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.enable_input_require_grads()
            model.train()
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in own])
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain.any() and torch.equal(plain, recomputed)


@pytest.mark.parametrize(("name", "implementation"), [("gpt_oss", "grouped_mm"), ("mixtral", "batched_mm")])
def test_a_model_compiles_into_one_graph(name, implementation):
    """As without adapters; in eager the base breaks at the loop over experts."""
    model = adapted(name, implementation)
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]
    results = []
    torch._dynamo.reset()
    for compute in (
        model.base_model.model,
        torch.compile(model.base_model.model, fullgraph=True, backend="aot_eager"),
    ):
        output = compute(input_ids=IDS, labels=IDS)
        results.append([output.logits, *torch.autograd.grad(output.loss, own)])
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain)


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
@pytest.mark.parametrize("k", [1, 4])
def test_nothing_as_large_as_an_expert_is_made(implementation, k):
    """Cost follows trained entries and routed tokens: no update and no gradient of an expert's shape."""
    model = alone(implementation, k, hidden=256, intermediate=192, experts=3)
    x, index, weights = routed([[0, 2], [2, 0], [2, 1]] * 2, hidden=256)
    with LargestAllocation() as allocations:
        model(x, index, weights).sum().backward()
    operators = ("bypass_product", "sparse_grad_values", "sparse_grad_input")
    assert allocations.entered >= {f"peft_ext::{operator}" for operator in operators}
    assert allocations.elements < 192 * 256 // 4


def test_what_is_not_known_of_a_forward_is_said():
    class Odd(MixtralExperts):
        def forward(self, x, *_):
            return torch.einsum("tf,erf->tr", x, self.gate_up_proj)

    config = MixtralConfig(hidden_size=16, intermediate_size=24, num_local_experts=4)
    experts = Odd(config)
    bank = ExpertBank(experts, "gate_up_proj")
    added = {"gate_up_proj": (bank, lambda result, x, ends: result)}
    with pytest.raises(NotImplementedError, match=r"Odd \(.*calls einsum with its 'gate_up_proj'.*grouped_mm"):
        run_with(experts, added, torch.randn(3, 16))
    Odd.forward = lambda self, x, *_: x @ self.gate_up_proj[0]
    with pytest.raises(NotImplementedError, match="multiplies by the other side"):
        run_with(experts, added, torch.randn(3, 16))
    Odd.forward = lambda self, x, *_: self.gate_up_proj.sum()
    with pytest.raises(AttributeError, match="asks for `sum` of its 'gate_up_proj'"):
        run_with(experts, added, torch.randn(3, 16))


def test_an_implementation_by_kernels_is_refused():
    """They would read the memory of the weights and pass over the adapters."""
    model = adapted()
    for kernels in ("sonicmoe", "deepgemm"):
        model.config._experts_implementation_internal = kernels
        with pytest.raises(NotImplementedError, match=f"experts_implementation='{kernels}'.*'grouped_mm'"):
            run(model, input_ids=IDS)


def test_an_attention_beside_experts_is_adapted_too():
    assert_equals_dense("mixtral", adapted(target_modules=["experts", "q_proj", "o_proj"]), tiny())
