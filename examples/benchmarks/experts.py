"""
Time and memory of one training step on fused experts: NeuroAda beside LoRA on `target_parameters`.

    python examples/benchmarks/experts.py                  # 8 experts of width 512, 1024 tokens, CPU, fp32, 2 threads
    python examples/benchmarks/experts.py --hidden 2048 --intermediate 768 --experts 128 --per-token 8 --device cuda

A step is zero_grad, forward, backward (down to the block's input) and AdamW on one Mixtral block of random weights: a
router and its experts, which alone are adapted. NeuroAda's output and gradients are compared with dense weights first;
if they differ, nothing is timed. Steps of all methods are interleaved, and ratios are medians over rounds.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from _common.arguments import positive, refusing
from _common.memory import peak_bytes
from _common.report import mebibytes, table
from _common.runner import add_run, begin, finish, parser_for, time_row, times_of
from _common.steps import Stepper, interleave
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from peft_ext import NeuroAdaConfig


TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # largest error over the reference's largest entry
BANKS = ["gate_up_proj", "down_proj"]


class Block(nn.Module):
    """One mixture of experts; its loss is the mean square of what it computes."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        config = MixtralConfig(
            hidden_size=args.hidden,
            intermediate_size=args.intermediate,
            num_local_experts=args.experts,
            num_experts_per_tok=args.per_token,
        )
        config._experts_implementation = args.implementation
        self.mlp = MixtralSparseMoeBlock(config)
        torch.manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.02)
        self.to(args.device, getattr(torch, args.dtype)).requires_grad_(False)

    def forward(self, x: Tensor) -> SimpleNamespace:
        y = self.mlp(x)
        return SimpleNamespace(y=y, loss=y.float().square().mean())


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_for(__doc__)
    parser.add_argument("--hidden", type=positive, default=512, help="width of the residual stream (%(default)s)")
    parser.add_argument("--intermediate", type=positive, default=1792, help="width of an expert (%(default)s)")
    parser.add_argument("--experts", type=positive, default=8, help="(%(default)s)")
    parser.add_argument("--per-token", type=positive, default=2, help="experts that a token goes to (%(default)s)")
    parser.add_argument("--tokens", type=positive, default=1024, help="tokens of a batch (%(default)s)")
    parser.add_argument("--k", type=positive, nargs="+", default=[1, 20], help="NeuroAda's entries (1 20)")
    parser.add_argument("--rank", type=positive, default=8, help="LoRA's rank (%(default)s)")
    parser.add_argument("--implementation", choices=("grouped_mm", "eager", "batched_mm"), default="grouped_mm")
    add_run(parser, steps=20)
    args = parser.parse_args(argv)
    with refusing(parser):
        if args.per_token > args.experts:
            raise ValueError(f"`per-token` ({args.per_token}) is more than there are experts: lower it")
    return args


def configs(args: argparse.Namespace) -> dict[str, PeftConfig | None]:
    """The lines of the comparison, by name; `None` trains nothing."""
    lines: dict[str, PeftConfig | None] = {
        f"neuroada-k{k}": NeuroAdaConfig(k=k, target_modules=["experts"]) for k in args.k
    }
    parameters = [f"mlp.experts.{bank}" for bank in BANKS]
    lora = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules=[], target_parameters=parameters)
    return {**lines, f"lora-r{args.rank}": lora, "frozen": None}


def errors(model: PeftModel, x: Tensor) -> dict[str, float]:
    """How far an adapter with values is from dense weights with the updates in them: output, input and values."""
    experts = model.base_model.model.mlp.experts
    generator = torch.Generator().manual_seed(1)
    layers = [getattr(experts, bank) for bank in BANKS]
    values = [layer.deltas["default"].weight for layer in layers]
    for value in values:
        value.data.copy_(0.02 * torch.randn(value.shape, generator=generator))
    dense = {
        bank: (getattr(experts.base_layer, bank) + layer.get_delta_weight("default")).detach().requires_grad_()
        for bank, layer in zip(BANKS, layers, strict=True)
    }
    results = []
    for parameters in (None, dense):
        inputs = x.detach().requires_grad_()
        if parameters is None:
            y, leaves = model(inputs).y, values
        else:
            with model.disable_adapter():
                names = {f"base_model.model.mlp.experts.base_layer.{bank}": w for bank, w in parameters.items()}
                y, leaves = torch.func.functional_call(model, names, (inputs,)).y, list(parameters.values())
        results.append([y.detach(), *torch.autograd.grad(y.float().square().sum(), [inputs, *leaves])])
    for place, layer in enumerate(layers, 2):
        bank = layer.get_base_layer()
        results[1][place] = layer.deltas["default"].support.gather(bank.neurons(results[1][place]))
    return {
        name: float((ours - theirs).float().abs().max() / theirs.float().abs().max())
        for name, ours, theirs in zip(["output", "input", *BANKS], *results, strict=True)
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = parse(argv)
    dtype, device = begin(args)
    x = torch.randn(1, args.tokens, args.hidden, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    steppers, gate = {}, {}
    for name, config in configs(args).items():
        model = Block(args) if config is None else get_peft_model(Block(args), config)
        if isinstance(config, NeuroAdaConfig):
            gate[name] = errors(model, x)
            if not max(gate[name].values()) <= TOLERANCE[dtype]:
                raise RuntimeError(f"{name} differs from dense weights, so nothing is timed: {gate[name]}")
        steppers[name] = Stepper(model, {"x": x.detach().requires_grad_()})
    times = interleave(steppers, args.steps, args.warmup, device)
    lora = next(name for name in times if name.startswith("lora"))
    results = {
        name: {
            **times_of(name, times, [lora], sum(p.numel() for p in stepper.model.parameters() if p.requires_grad)),
            "peak_bytes": peak_bytes(stepper, device),
            "optimizer_bytes": stepper.optimizer_bytes(),
        }
        for name, stepper in steppers.items()
    }
    rows = [
        {
            **time_row(name, result),
            "peak of a step, MiB": mebibytes(result["peak_bytes"]),
            "optimiser, MiB": mebibytes(result["optimizer_bytes"]),
        }
        for name, result in results.items()
    ]
    print(table(rows))
    shape = {name: vars(args)[name] for name in ("hidden", "intermediate", "experts", "per_token", "tokens")}
    setting = {"shape": shape, "implementation": args.implementation}
    return finish(args, {**setting, "gate": gate, "results": results})


if __name__ == "__main__":
    main()
