"""torch.compile on a whole language model: one graph, the same numbers, and nothing compiled twice."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM

from peft_ext import NeuroAdaConfig, PSNConfig, hotswap_adapter
from peft_ext.sparse.layers import SparseLayer


CONFIGS = {
    "NeuroAda": lambda: NeuroAdaConfig(k=2, init_weights=False),
    "PSN, ragged with biases": lambda: PSNConfig(
        k=2, selection="magnitude_network", train_bias=True, init_weights=False
    ),
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Where a graph breaks or a model is compiled again, the test fails."""
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    assert not counters["graph_break"], counters["graph_break"]
    torch._dynamo.reset()


@pytest.fixture
def bases():
    """Function: dtype to a language model of one block, a new copy each time."""

    def make(dtype=torch.float32):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
            initializer_range=0.1, attention_bias=True,
        )  # fmt: skip
        return LlamaForCausalLM(config).to(dtype)

    return make


@pytest.fixture
def base(bases):
    return bases()


def adapted(base, method="NeuroAda", seed=0, **options):
    torch.manual_seed(seed)
    config = CONFIGS[method]()
    for name, value in options.items():
        setattr(config, name, value)
    model = get_peft_model(base, config).train()
    for layer in layers(model):
        layer.deltas["default"].weight.data.mul_(0.1)
    return model


def layers(model):
    return [module for module in model.modules() if isinstance(module, SparseLayer)]


def gradients(model, ids, forward=None, **context):
    """Loss and gradients of a training step."""
    model.zero_grad()
    with torch.autocast("cpu", **context, enabled=bool(context)):
        loss = (model if forward is None else forward)(ids, labels=ids, use_cache=False).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert found
    return {"loss": loss.detach(), **found}


def assert_same(results, expected, atol=1e-6, rtol=1e-4):
    assert results.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(results[name], value, atol=atol, rtol=rtol, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("method", CONFIGS)
def test_training_step_is_one_graph(base, ids, method):
    model = adapted(base, method)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        assert_same(gradients(model, ids, compiled), gradients(model, ids))
        for layer in layers(model):  # as a step of an optimiser does
            layer.deltas["default"].weight.data.add_(0.05)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_generated_code_gives_the_same(base, ids):
    model = adapted(base)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True)
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("backend", "origin"), [("auto", "loaded"), ("bypass", "created")])
def test_hot_swap(bases, ids, tmp_path, backend, origin):
    for name, seed in (("first", 1), ("second", 2)):
        adapted(bases(), seed=seed, selection="random", backend=backend).save_pretrained(tmp_path / name)
    model = adapted(bases(), backend=backend)
    if origin == "loaded":
        model = PeftModel.from_pretrained(bases(), tmp_path / "first", is_trainable=True)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    gradients(model, ids, compiled)
    for name in ("first", "second"):
        hotswap_adapter(compiled, str(tmp_path / name))
        assert_same(gradients(model, ids, compiled), gradients(model, ids))


def test_a_state_dict_that_is_loaded_compiles_nothing_anew(base, ids):
    """What is compiled does not ask whether the entries were checked since, which loading undoes."""
    model = adapted(base)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    gradients(model, ids, compiled)
    model.load_state_dict(model.state_dict())
    assert not any(layer.deltas["default"].checked for layer in layers(model))
    assert_same(gradients(model, ids, compiled), gradients(model, ids))


def test_switching_adapters_compiles_at_most_once_for_each(base, ids):
    model = adapted(base)
    torch.manual_seed(1)
    model.add_adapter("second", NeuroAdaConfig(k=2, init_weights=False, selection="random"))
    with torch._dynamo.config.patch(error_on_recompile=False):
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        for name in ("default", "second"):
            model.set_adapter(name)
            assert_same(gradients(model, ids, compiled), gradients(model, ids))
    for name in ("default", "second", "default"):  # known by now
        model.set_adapter(name)
        assert_same(gradients(model, ids, compiled), gradients(model, ids))


def test_autocast(base, ids):
    model = adapted(base)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = gradients(model, ids, dtype=torch.bfloat16)
    # Products are rounded to bf16 on the way, in places that the compiler may choose.
    results = gradients(model, ids, compiled, dtype=torch.bfloat16)
    torch.testing.assert_close(results["loss"], expected["loss"], atol=1e-2, rtol=1e-2)
    for name, value in expected.items():
        assert (results[name] - value).abs().max() <= 0.05 * value.abs().max(), name


def test_16_bit_base(bases, ids):
    model = adapted(bases(torch.bfloat16))
    expected = gradients(model, ids)
    results = gradients(model, ids, torch.compile(model, backend="aot_eager", fullgraph=True))
    for name, value in expected.items():
        assert (results[name].float() - value.float()).abs().max() <= 0.05 * value.float().abs().max(), name


def test_gradient_checkpointing(base, ids):
    model = adapted(base)
    expected = gradients(model, ids)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    # A hook that sets requires_grad on the embeddings' output, for the reentrant kind alone: it would break the graph.
    model.get_base_model().disable_input_require_grads()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same(gradients(model, ids, compiled), expected)


@pytest.mark.slow
def test_reentrant_gradient_checkpointing_breaks_the_graph_and_gives_the_same(base, ids):
    """PyTorch does not trace it: what lies between the checkpoints is compiled."""
    model = adapted(base)
    expected = gradients(model, ids)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with torch._dynamo.config.patch(error_on_recompile=False):
        assert_same(gradients(model, ids, torch.compile(model, backend="eager")), expected)
    assert counters["graph_break"]
    counters.clear()
