"""Experts with sparse updates compute what dense weights with the updates in them do, and train as masked ones."""

import pytest
import torch

from tests._models.experts import (
    COLUMNS,
    IMPLEMENTATIONS,
    MODELS,
    adapted,
    dense_weights,
    layers_of,
    run,
    tiny,
    token_ids,
)

from .._asserts import positions


EVERY = pytest.mark.parametrize("name", MODELS)


def _embedded(base):
    return base.get_input_embeddings()(token_ids()).detach().requires_grad_()


def assert_equals_dense(name, model, base, **inputs):
    """The output and the gradients of all values and of the embedded tokens."""
    layers = layers_of(model)
    values = {key: layer.deltas["default"].weight for key, layer in layers.items()}
    copies = {key: value.detach().clone().requires_grad_() for key, value in values.items()}
    results = []
    for leaves, compute in (
        (values, lambda x: run(model, inputs_embeds=x, **inputs)),
        (copies, lambda x: run(base, dense_weights(name, model, base, copies), inputs_embeds=x, **inputs)),
    ):
        x = _embedded(base)
        logits = compute(x)
        gradient = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
        results.append([logits, *torch.autograd.grad(logits, [x, *leaves.values()], gradient)])
    for what, ours, dense in zip(["output", "x", *values], *results, strict=True):
        assert dense.abs().max() > 0, what
        torch.testing.assert_close(ours, dense, atol=1e-5 * float(dense.detach().abs().max()), rtol=0, msg=what)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize(
    ("name", "implementation"),
    [(name, kind) for name in MODELS for kind in (("eager",) if name == "llama4_text" else IMPLEMENTATIONS)],
)
def test_output_and_every_gradient(name, implementation, k):
    assert_equals_dense(name, adapted(name, implementation, k=k), tiny(name))


@pytest.mark.parametrize("selection", ["magnitude_layer", "random_network"])
@pytest.mark.parametrize("name", ["mixtral", *COLUMNS])
def test_uneven_rows(name, selection):
    assert_equals_dense(name, adapted(name, selection=selection), tiny(name))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_starts_as_the_base_model_in_every_bit(implementation):
    base = tiny()
    base.set_experts_implementation(implementation)
    expected = run(base, input_ids=token_ids())
    model = adapted(base=base)
    for layer in layers_of(model).values():
        layer.deltas["default"].weight.data.zero_()
    assert torch.equal(run(model, input_ids=token_ids()), expected)


def _train(parameters, optimiser, loss, steps):
    kinds = {"sgd": (torch.optim.SGD, {"lr": 1e-2}), "adam": (torch.optim.Adam, {"lr": 1e-2, "eps": 1e-3})}
    kind, options = kinds[optimiser]
    step = kind(parameters, **options)
    for _ in range(steps):
        step.zero_grad()
        loss().backward()
        step.step()


@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
@EVERY
def test_trains_as_masked_weights_do(name, optimiser):
    model, dense = adapted(name, k=1), tiny(name)
    ids = token_ids()
    for layer in layers_of(model).values():
        layer.deltas["default"].weight.data.zero_()
    trained = {}
    for key in layers_of(model):
        weight = trained[key] = dense.get_parameter(key)
        mask = dense_weights(
            name, model, dense, {n: torch.ones_like(m.deltas["default"].weight) for n, m in layers_of(model).items()}
        )[key]
        mask = mask != weight
        weight.register_hook(lambda gradient, mask=mask: gradient * mask)
    before = {key: weight.detach().clone() for key, weight in trained.items()}
    _train(trained.values(), optimiser, lambda: dense(input_ids=ids, labels=ids).loss, 20)
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]
    _train(own, optimiser, lambda: model(input_ids=ids, labels=ids).loss, 20)
    values = {key: layer.deltas["default"].weight.detach() for key, layer in layers_of(model).items()}
    ours = dense_weights(name, model, tiny(name), values)
    for key, weight in trained.items():
        moved = (weight - before[key]).abs().max()
        assert moved > 1e-3
        torch.testing.assert_close(ours[key], weight, atol=1e-4 * float(moved), rtol=1e-5)


@EVERY
def test_decay_moves_no_unselected_weight(name):
    model = adapted(name, base=tiny(name).to(torch.bfloat16), k=1)
    bits = {key: tensor.clone() for key, tensor in model.state_dict().items() if "_delta" not in key}
    values = {key: layer.deltas["default"].weight.clone() for key, layer in layers_of(model).items()}
    ids = token_ids()
    step = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        step.step()
    for key, tensor in bits.items():
        assert torch.equal(model.state_dict()[key], tensor), key
    assert all(not torch.equal(layer.deltas["default"].weight, values[key]) for key, layer in layers_of(model).items())
    merged = model.merge_and_unload().state_dict()
    for key, tensor in bits.items():
        plain = key.replace("base_model.model.", "").replace(".base_layer", "")
        changed = int((merged[plain] != tensor).sum())
        own = key.endswith("_proj") and ".experts." in key
        assert changed <= (values[plain].numel() if own else 0), key
        assert (changed > 0) == own, key


@EVERY
def test_merging_20_rounds_restores_every_bit(name):
    model = adapted(name, base=tiny(name).to(torch.bfloat16))
    bits = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    ids = token_ids()
    with torch.no_grad():
        expected = run(model, input_ids=ids).float()
        for number in range(20):
            model.merge_adapter(safe_merge=number == 0)
            if not number:
                merged = run(model, input_ids=ids).float()
                assert (merged - expected).abs().max() < 0.1 * expected.abs().max()
                assert sum(not torch.equal(model.state_dict()[key], bits[key]) for key in bits) == 2
            model.unmerge_adapter()
    for key, tensor in bits.items():
        assert torch.equal(model.state_dict()[key], tensor), key


def test_a_neuron_is_a_row_or_a_column_of_its_expert():
    """The largest weight of each, in the layouts that the model's classes have."""
    for name in ("mixtral", "gpt_oss"):
        base = tiny(name)
        model = adapted(name, k=1)
        for key, layer in layers_of(model).items():
            weight = base.get_parameter(key).detach()
            neurons = weight.transpose(1, 2) if name in COLUMNS else weight
            expected = neurons.abs().argmax(-1).reshape(-1)
            assert [column for _, column in positions(layer.deltas["default"].support)] == expected.tolist()
