"""Experts with sparse updates compute what dense weights with the updates in them do."""

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
