"""What the tests of MoReS share: adapters with values in them, and steering written out as a reference."""

from contextlib import contextmanager

import torch
from peft import get_peft_model

from peft_ext import MoReSConfig
from peft_ext.tuners.mores import MoReSLayer
from tests._models.vision_language import IMAGE, build


def logits(model, batch, **kwargs):
    with torch.no_grad():
        return model(**batch, **kwargs).logits


def layers_of(model):
    """The steered places by name of the steered module."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, MoReSLayer):
            found[name.removeprefix("base_model.model.").rpartition(".")[0]] = module
    return found


def fill(model, adapter_name="default", seed=1, scale=0.3):
    """Give an adapter values as training would, also its directions."""
    generator = torch.Generator().manual_seed(seed)
    for layer in layers_of(model).values():
        if adapter_name in layer.mores_steering:
            for parameter in layer.mores_steering[adapter_name].parameters():
                noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                parameter.data.copy_(parameter.data + scale * noise if parameter.dim() == 1 else noise * scale)
    return model


def adapted(family="llava", seed=1, dtype=torch.float32, **options):
    """A tiny model with one adapter in it, with values, in eval mode."""
    options = {"rank": 2, "token_ratio": 0.25, **options}
    return fill(get_peft_model(build(family, dtype=dtype), MoReSConfig(**options)).eval(), seed=seed)


def bits(model, adapter_name="default"):
    """A copy of every tensor of an adapter."""
    return {
        f"{name}.{key}": tensor.clone()
        for name, layer in layers_of(model).items()
        for key, tensor in layer.mores_steering[adapter_name].state_dict().items()
    }


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
