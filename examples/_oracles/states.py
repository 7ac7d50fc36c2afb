"""Hidden states that MoReS steers, and logits of a model with knockouts."""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft_ext.knockout import AttentionKnockout, ModuleKnockout, windows
from peft_ext.tuners.mores.steering import Steering

from .loading import Row, Stub, published, relative


WIDTH, RANK, LAYERS, TOKENS = 64, 4, 4, 12


class _Intervention(nn.Module):
    """What pyreft needs of pyvene's base classes: the width."""

    def __init__(self, embed_dim: int, **kwargs: object) -> None:
        super().__init__()
        self.embed_dim = embed_dim


def _pyvene() -> types.ModuleType:
    module = types.ModuleType("pyvene")
    for name in ("ConstantSource", "Sourceless", "Trainable", "DistributedRepresentation"):
        setattr(module, f"{name}Intervention", type(f"{name}Intervention", (_Intervention,), {}))
    return module


def steering(code: Path) -> Iterator[Row]:
    """LLaVA-Steering calls pyreft's intervention for MoReS."""
    module = published(code, "pyreft", "pyreft/interventions.py", pyvene=_pyvene())
    torch.manual_seed(0)
    theirs = module.LoreftIntervention(embed_dim=WIDTH, low_rank_dimension=RANK, dtype=torch.float32)
    ours = Steering(WIDTH, RANK)
    with torch.no_grad():
        ours.raw_up.copy_(theirs.rotate_layer.weight)
        ours.weight.copy_(theirs.learned_source.weight)
        ours.bias.copy_(theirs.learned_source.bias)
    hidden = torch.randn(5, WIDTH)
    expected, actual = theirs(hidden), hidden + ours(hidden)
    gradients = [
        torch.autograd.grad(output.square().sum(), weight)[0]
        for output, weight in ((actual, ours.weight), (expected, theirs.learned_source.weight))
    ]
    yield Row(
        "MoReS", "pyreft `LoreftIntervention`", f"steered states and the gradient of W, rank {RANK}",
        f"states {relative(actual.detach(), expected.detach()):.0e}, gradient {relative(*gradients):.0e}",
    )  # fmt: skip


@torch.no_grad()
def knockout(code: Path) -> Iterator[Row]:
    repository = "cross-modal-information-flow-in-MLLM"
    module = published(code, repository, "methods.py", ("matplotlib",), utils=Stub("utils"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=WIDTH, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=4,
        initializer_range=0.2, attn_implementation="eager",
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(64, (1, TOKENS))
    source, target = torch.zeros(1, TOKENS, dtype=torch.bool), torch.zeros(1, TOKENS, dtype=torch.bool)
    source[0, 2:6], target[0, 7:10] = True, True
    edges = [(to, origin) for to in range(7, 10) for origin in range(2, 6)]
    clean, blocked, zeroed = model(ids).logits, [], []
    for window in windows(LAYERS, 3):
        layers = list(range(window.start, window.end))
        hooks = module.set_block_attn_hooks_llava(model, dict.fromkeys(layers, edges), block_desc="Image->Question")
        expected = model(ids).logits
        for layer, forward in hooks:
            model.model.layers[layer].self_attn.forward = forward
        with AttentionKnockout(model, layers, [(source, target)]):
            blocked.append(relative(model(ids).logits - clean, expected - clean))
        hooks = module.set_block_attn_add_hooks_llava(
            model, {layer: range(WIDTH) for layer in layers}, 0, only_knockout_question=True,
            question_range=list(range(7, 10)),
        )  # fmt: skip
        expected = model(ids).logits
        for hook in hooks:
            hook.remove()
        with ModuleKnockout(model, layers, target):
            zeroed.append(relative(model(ids).logits - clean, expected - clean))
    for name, function, differences in (
        ("`AttentionKnockout`", "set_block_attn_hooks_llava", blocked),
        ("`ModuleKnockout`", "set_block_attn_add_hooks_llava", zeroed),
    ):
        yield Row(
            name, f"information-flow `{function}`", f"change of the logits, all windows of a Llama of {LAYERS} layers",
            f"relative difference ≤ {max(differences):.0e}" if max(differences) else "the same bits",
        )  # fmt: skip
