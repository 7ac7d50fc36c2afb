"""What the tests of MoReS share: adapters with values in them, and steering written out as a reference."""

from contextlib import contextmanager

import torch
from peft import get_peft_model

from peft_ext import MoReSConfig
from tests._models.vision_language import IMAGE, build
from tests.contract import _common as contract


def layers_of(model):
    """The steered places by name of the steered module."""
    places = contract.layers_of(model).items()
    return {name.removeprefix("base_model.model.").removesuffix(".steering"): layer for name, layer in places}


def adapted(family="llava", seed=1, dtype=torch.float32, **options):
    """A tiny model with one adapter in it, with values, in eval mode."""
    options = {"rank": 2, "token_ratio": 0.25, **options}
    return contract.fill(get_peft_model(build(family, dtype=dtype), MoReSConfig(**options)).eval(), seed=seed)


def assert_orthonormal(model):
    for layer in layers_of(model).values():
        for steering in layer.mores_steering.values():
            for factor in (steering.up(), steering.down()):
                assert (factor.T @ factor - torch.eye(factor.shape[1])).abs().max() <= 1e-6


def gram_schmidt(raw):
    """Orthonormal columns, one at a time."""
    columns = []
    for column in raw.T:
        for other in columns:
            column = column - (other @ column) * other
        columns.append(column / column.norm())
    return torch.stack(columns, dim=1)


def steered(hidden, chosen, parameters):
    """h + R(W h + b − Rᵀh) where `chosen`, token by token."""
    up = gram_schmidt(parameters["raw_up"])
    down = up if "raw_down" not in parameters else gram_schmidt(parameters["raw_down"])
    new = hidden.clone()
    for row, token in chosen.nonzero().tolist():
        h = hidden[row, token]
        inner = parameters["weight"] @ h - down.T @ h
        if "bias" in parameters:
            inner = inner + parameters["bias"]
        new[row, token] = h + up @ inner
    return new


@contextmanager
def steered_base(base, parameters, chosen):
    """Around a call: the base model, steered by `parameters` (per module name, per parameter name) at `chosen`."""

    def hook(name):
        def steer(module, args, output):
            if isinstance(output, tuple):
                return (steered(output[0], chosen, parameters[name]), *output[1:])
            return steered(output, chosen, parameters[name])

        return steer

    handles = [base.get_submodule(name).register_forward_hook(hook(name)) for name in parameters]
    try:
        yield base
    finally:
        for handle in handles:
            handle.remove()


def values_of(model, adapter_name="default", requires_grad=False):
    """The parameters as `steered_base` takes them, cut off from the model."""
    return {
        name: {
            key: parameter.detach().clone().requires_grad_(requires_grad)
            for key, parameter in layer.mores_steering[adapter_name].named_parameters()
        }
        for name, layer in layers_of(model).items()
        if adapter_name in layer.mores_steering
    }


def ends(ids, ratio):
    """The chosen tokens of `token_selection="ends"` with one image per row at most: first and last visual tokens."""
    chosen = torch.zeros_like(ids, dtype=torch.bool)
    for row, tokens in enumerate(ids):
        visual = (tokens == IMAGE).nonzero().flatten().tolist()
        if visual:
            count = max(1, round(ratio * len(visual)))
            for token in visual[: count // 2] + visual[len(visual) - (count - count // 2) :]:
                chosen[row, token] = True
    return chosen


def changed_tokens(model, call):
    """Where the first layer changed its output during a call: a list of bool `[batch, tokens]`, one per step."""
    seen = []

    def states(output):
        return output[0] if isinstance(output, tuple) else output

    layer = model.get_base_model().get_decoder().layers[0]
    # The first hook sees the layer's own output, the last what is passed on.
    first = layer.register_forward_hook(lambda m, a, out: seen.append([states(out)]), prepend=True)
    last = layer.register_forward_hook(lambda m, a, out: seen[-1].append(states(out)))
    with torch.no_grad():
        call()
    first.remove()
    last.remove()
    return [(before != after).any(dim=-1) for before, after in seen]


def changed(model, batch, **kwargs):
    return changed_tokens(model, lambda: model(**batch, **kwargs))[0]
