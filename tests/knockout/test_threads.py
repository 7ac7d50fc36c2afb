"""Knockouts and what else listens to a model are for the thread that asked: others get the model as it is."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from peft_ext.knockout import FlowSample, layer_sweep, residual_stream
from tests._models.vision_language import build, grouped, prepared

from ._runs import knockout


def in_another_thread(work):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_another_thread_gets_the_model_as_it_is(kind):
    """Also with another prompt, of which a knockout would say that its masks do not fit."""
    model, batch, groups = prepared("llama", texts=((3, 7),))
    other = {name: value[:, 2:] for name, value in batch.items()}
    with torch.no_grad():
        clean, clean_other = model(**batch).logits, model(**other).logits
        with knockout(model, groups, kind):
            before = model(**batch).logits
            found = [in_another_thread(lambda x=x: torch.no_grad()(model)(**x).logits) for x in (batch, other)]
            after = model(**batch).logits
    assert torch.equal(found[0], clean) and torch.equal(found[1], clean_other)
    assert torch.equal(before, after) and not torch.allclose(before, clean)


def test_each_thread_has_its_own_knockout():
    model, batch, groups = prepared("llama", texts=((3, 7),))

    def knocked(kind):
        with torch.no_grad(), knockout(model, groups, kind):
            return model(**batch).logits

    alone = {kind: knocked(kind) for kind in ("attention", "mlp")}
    with torch.no_grad(), knockout(model, groups, "attention"):
        assert torch.equal(in_another_thread(lambda: knocked("mlp")), alone["mlp"])
        assert torch.equal(model(**batch).logits, alone["attention"])


def test_a_model_that_runs_in_another_thread_alone_is_said_to_be_untouched():
    model, batch, groups = prepared("llama", texts=((3, 7),))
    with pytest.warns(UserWarning, match="in the same thread"), knockout(model, groups, "attention"):
        in_another_thread(lambda: model(**batch))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_checkpointed_layers_that_another_thread_recomputes_are_knocked_out(kind, reentrant):
    """As autograd's own threads do on a GPU."""
    batch, groups = grouped("llama")
    gradients = []
    for checkpointing in (False, True):
        model = build("llama").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        with knockout(model, groups, kind):
            loss = model(**batch, use_cache=False).logits.square().mean()
            in_another_thread(loss.backward)
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("engine", ["full", "suffix", "packed"])
def test_a_sweep_is_not_disturbed_by_another_thread(engine, monkeypatch):
    """Another thread calls the model, with another prompt, from inside each of the sweep's calls to a layer."""
    model, batch, groups = prepared("llama", texts=((3, 7),))
    other = {name: value[:, 3:] for name, value in batch.items()}
    owner = threading.get_ident()
    with torch.no_grad():
        expected = model(**other).logits
    calls = []

    def sweep():
        sample = FlowSample(batch, groups)
        return layer_sweep(model, sample, ["image:question"], 2, engine=engine, self_check=False, progress=False)

    alone = sweep()

    def meanwhile(*_):
        if threading.get_ident() == owner and len(calls) < 6:
            calls.append(in_another_thread(lambda: torch.no_grad()(model)(**other).logits))

    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(meanwhile, prepend=True)
    assert sweep() == alone
    assert len(calls) == 6 and all(torch.equal(call, expected) for call in calls)


def test_states_are_those_of_the_own_call():
    model, batch, _ = prepared("llama", texts=((3, 7),))
    expected = residual_stream(model, batch)
    owner = threading.get_ident()

    def meanwhile(*_):
        if threading.get_ident() == owner:
            in_another_thread(lambda: torch.no_grad()(model)(input_ids=batch["input_ids"].flip(1)))

    model.model.layers[1].register_forward_hook(meanwhile)
    assert torch.equal(residual_stream(model, batch), expected)
