"""The methods that are compared, each built over one set of base weights.

- `frozen`: the limit. Nothing is trained, but the backward pass reaches the output of every adapted linear, as any
  adapter in that place needs. The input gradient of a linear is computed only where something before it needs
  one: not for the first block's q, k and v, whose input is the frozen embedding. No weight gradient, no optimiser.
- `frozen-inputs`: the same down to the input embeddings, hence all the input gradients, those three included.
- `neuroada-k<k>[@backend]`: `peft_ext`'s NeuroAda.
- `lora-r<r>`: PEFT's LoRA.
- `shira-k<k>`, `supertuning-k<k>`: PEFT's SHiRA (random mask) and Super-Tuning (magnitude over a matrix) with as many
  trained parameters as NeuroAda at k, as near as their own settings allow.
- `masked-k<k>`: dense weights whose gradient is multiplied by a dense 0/1 mask at NeuroAda's support; dense AdamW
  state.
- `full`: every parameter of the model.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftConfig, ShiraConfig, SupertuningConfig, get_peft_model
from torch import Tensor, nn

from peft_ext import NeuroAdaConfig


SYNTAX = re.compile(
    r"(?P<kind>frozen-inputs|frozen|full|neuroada|lora|shira|supertuning|masked)(-(?P<letter>[kr])(?P<size>[1-9]\d*))?"
    r"(@(?P<backend>\w+))?"
)
SIZE_LETTER = {"neuroada": "k", "shira": "k", "supertuning": "k", "masked": "k", "lora": "r"}


@dataclass(frozen=True)
class Method:
    """
    One line of the comparison.

    Args:
        name (`str`): As given on the command line.
        kind (`str`): Which method.
        size (`int`): k (entries per neuron) or r (rank); 0 for methods without one.
        backend (`str`): NeuroAda's backend.
    """

    name: str
    kind: str
    size: int = 0
    backend: str = "auto"

    @classmethod
    def parse(cls, name: str) -> Method:
        match = SYNTAX.fullmatch(name)
        if match is None or match["letter"] != SIZE_LETTER.get(match["kind"]):
            raise ValueError(
                f"`methods` contains {name!r}, which is no method: use frozen, frozen-inputs, full, neuroada-k<k>, "
                "neuroada-k<k>@<backend>, lora-r<r>, shira-k<k>, supertuning-k<k> or masked-k<k>"
            )
        if match["backend"] and match["kind"] != "neuroada":
            raise ValueError(f"`methods` contains {name!r}: only neuroada has backends, drop '@{match['backend']}'")
        NeuroAdaConfig(backend=match["backend"] or "auto")  # refuses those that it does not know
        return cls(name, match["kind"], int(match["size"] or 0), match["backend"] or "auto")


def targeted(model: nn.Module, targets: Sequence[str]) -> Iterator[nn.Linear]:
    """The linear layers whose last name is among the targets."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in targets:
            yield module


def share(model: nn.Module) -> nn.Module:
    """A copy of the modules over the very same parameters and buffers: any number of methods, one set of weights."""
    memo: dict[int, object] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)


def require_output_gradients(model: nn.Module, targets: Sequence[str]) -> None:
    """Make the backward pass reach each target's output, and no further than one of them."""

    def begin_here(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if not output.requires_grad:
            output.requires_grad_(True)

    for linear in targeted(model, targets):
        linear.register_forward_hook(begin_here)


def require_input_gradients(model: nn.Module) -> None:
    """Make the backward pass reach the embeddings (models without them get inputs that require a gradient)."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(lambda module, args, output: output.requires_grad_(True))


def mask_gradients(model: nn.Module, targets: Sequence[str], k: int) -> None:
    """Train whole weights, but let a gradient through only at the k largest magnitudes of each row."""
    for linear in targeted(model, targets):
        weight = linear.weight
        support = weight.detach().abs().topk(min(k, weight.shape[1]), dim=1).indices  # [rows, k]
        mask = torch.zeros_like(weight).scatter_(1, support, 1)  # [rows, fan_in]
        weight.requires_grad_(True)
        weight.register_hook(mask.mul)
        linear.register_buffer("gradient_mask", mask, persistent=False)  # to be counted with the model's memory


def peft_config(method: Method, linears: list[nn.Linear], targets: Sequence[str]) -> PeftConfig:
    """The configuration of an adapter; the other sparse methods get NeuroAda's number of trained parameters."""
    names = list(targets)
    if method.kind == "lora":
        return LoraConfig(r=method.size, lora_alpha=2 * method.size, target_modules=names)
    if method.kind == "neuroada":
        return NeuroAdaConfig(k=method.size, backend=method.backend, target_modules=names)
    budget = sum(linear.out_features * min(method.size, linear.in_features) for linear in linears)
    if method.kind == "shira":
        # SHiRA trains r·(rows + fan_in) entries of a weight, with one integer r for the model.
        r = max(1, round(budget / sum(linear.out_features + linear.in_features for linear in linears)))
        return ShiraConfig(r=r, target_modules=names, random_seed=0)
    # Super-Tuning trains the same share of every weight.
    share_of_weights = budget / sum(linear.weight.numel() for linear in linears)
    return SupertuningConfig(sparsity=1 - share_of_weights, target_modules=names)


def adapt(base: nn.Module, method: Method, targets: Sequence[str]) -> nn.Module:
    """The base prepared for one method. All but `masked` and `full`, which move the weights, share the base's."""
    linears = list(targeted(base, targets))
    if not linears:
        raise ValueError(f"`targets` {list(targets)} name no linear layer of the model: pass names that exist")
    if method.kind == "full":
        return copy.deepcopy(base).requires_grad_(True)
    if method.kind == "masked":
        model = copy.deepcopy(base)
        mask_gradients(model, targets, method.size)
        return model
    model = share(base)
    if method.kind == "frozen":
        require_output_gradients(model, targets)
    elif method.kind == "frozen-inputs":
        require_input_gradients(model)
    else:
        model = get_peft_model(model, peft_config(method, linears, targets))
    return model.train()


def trained_parameters(model: nn.Module, method: Method) -> int:
    """Entries that training moves: for `masked`, those that its mask lets through."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    if method.kind == "masked":
        return sum(p.shape[0] * min(method.size, p.shape[1]) for p in trainable)
    return sum(p.numel() for p in trainable)
