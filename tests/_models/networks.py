"""A small network per layer type, whose adapted layers stand between others."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import GptOssConfig, LlamaConfig, LlamaForCausalLM, MixtralConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.pytorch_utils import Conv1D


WIDTH = 6


def _around_conv(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(3))


class _Attention(nn.Module):
    def __init__(self, **options: int | bool) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True, **options)
        self.last = nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        key, value = x[..., : self.attention.kdim], x[..., : self.attention.vdim]
        return self.last(self.attention(x, key, value)[0]).mean(1)


class _Experts(nn.Module):
    """Fused experts, two of which compute each token."""

    def __init__(self, kind: type, config: type) -> None:
        super().__init__()
        sizes = config(hidden_size=WIDTH, intermediate_size=8, num_local_experts=4)
        sizes._experts_implementation_internal = "eager"
        self.router, self.experts, self.last = nn.Linear(WIDTH, 4), kind(sizes), nn.Linear(WIDTH, 3)
        for parameter in self.experts.parameters():
            nn.init.normal_(parameter, std=0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(0, 1)
        shares, chosen = self.router(tokens).softmax(-1).topk(2)
        return self.last(self.experts(tokens, chosen, shares)).view(*x.shape[:2], 3).mean(1)


class _Tied(nn.Module):
    """Two layers with one weight, and another two that are convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.two.weight = self.one.weight
        self.near, self.far = nn.Conv1d(4, 4, 3, padding=1), nn.Conv1d(4, 4, 3, padding=2, dilation=2)
        self.far.weight = self.near.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.far(torch.tanh(self.near(self.two(torch.tanh(self.one(x)))))).flatten(1)[:, :3]


# Network, the size of one sample, and the modules to adapt.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[str]]] = {
    "Linear": (lambda: nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 3)), (WIDTH,), ["0", "2"]),
    "Conv1D": (lambda: nn.Sequential(Conv1D(8, WIDTH), nn.Tanh(), Conv1D(3, 8)), (WIDTH,), ["0", "2"]),
    "Conv1d": (
        lambda: _around_conv(
            nn.Conv1d(3, 4, 3), nn.Tanh(), nn.Conv1d(4, 4, 3, padding="same", padding_mode="circular")
        ),
        (3, 7), ["0", "2"],
    ),
    "Conv2d": (
        lambda: _around_conv(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3, stride=2, dilation=2)),
        (2, 7, 7), ["0", "2"],
    ),
    "Conv2d grouped": (
        lambda: _around_conv(nn.Conv2d(4, 6, 1, groups=2), nn.Tanh(), nn.Conv2d(6, 6, 3, padding=1, groups=6)),
        (4, 5, 5), ["0", "2"],
    ),
    "Conv3d": (
        lambda: _around_conv(nn.Conv3d(2, 4, 2), nn.Tanh(), nn.Conv3d(4, 3, 3, padding=1, padding_mode="reflect")),
        (2, 4, 4, 4), ["0", "2"],
    ),
    "MultiheadAttention": (_Attention, (4, WIDTH), ["attention"]),
    "MultiheadAttention, unpacked": (lambda: _Attention(kdim=4, vdim=5), (4, WIDTH), ["attention"]),
    "experts": (lambda: _Experts(MixtralExperts, MixtralConfig), (4, WIDTH), ["experts"]),
    "experts in columns": (lambda: _Experts(GptOssExperts, GptOssConfig), (4, WIDTH), ["experts"]),
    "shared": (_Tied, (4, WIDTH), ["one", "two", "near", "far"]),
}  # fmt: skip


def make_network(kind: str, seed: int = 0) -> tuple[nn.Module, torch.Tensor, list[str]]:
    """A network with random weights, a batch for it, and its targets."""
    build, size, targets = NETWORKS[kind]
    torch.manual_seed(seed)
    network, x = build(), torch.randn(6, *size)
    network(x)  # lazy layers take their shapes
    return network, x, targets


def small_llama(**options: Any) -> Any:
    """A language model of one block, always with the same weights."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=2, initializer_range=0.3, **options)
    return LlamaForCausalLM(config).eval()
