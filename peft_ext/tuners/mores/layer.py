"""Steering at one place of a model: a child of the steered module, called by a hook on the module's output."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper, CheckpointWrapper

from ...hf.internals import BaseTunerLayer, check_adapters_to_merge
from .config import MoReSConfig
from .finder import TokenFinder
from .steering import Steering


CHILD = "steering"  # must not contain the method's prefix: PEFT takes such names for parameters of the method


class MoReSLayer(nn.Module, BaseTunerLayer):
    """
    The adapters that steer one module's output. It is registered as the module's child `steering`, and a forward hook
    passes the output through it. The module itself and its names stay as they are, whoever reads its attributes or
    records its output (`output_hidden_states=True`) finds what is there, and gradient checkpointing, which repeats
    the module's forward, does not repeat the steering.

    Args:
        owner (`nn.Module`): the steered module.
        hidden_size (`int`): D, the size of its output.
        finder ([`TokenFinder`], *optional*): tells which tokens to steer; `None` steers all.
    """

    set_adapter: Callable[..., None]
    merged: bool
    disable_adapters: bool
    active_adapters: list[str]

    adapter_layer_names: tuple[str, ...] = ("mores_steering",)
    other_param_names: tuple[str, ...] = ("configs",)

    def __init__(self, owner: nn.Module, hidden_size: int, finder: TokenFinder | None) -> None:
        super().__init__()
        self.mores_steering = nn.ModuleDict()
        self.configs: dict[str, MoReSConfig] = {}
        self.finder = finder
        self.hidden_size = hidden_size
        self.in_features = self.out_features = hidden_size
        self.merged_adapters: list[str] = []
        self._originals: tuple[Tensor, Tensor | None] | None = None  # weight and bias before merging
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self._owner = (owner,)  # in a tuple, so that it is not registered as a child of its child

    @property
    def owner(self) -> nn.Module:
        """The steered module."""
        return self._owner[0]

    def get_base_layer(self) -> nn.Module:
        return self.owner

    # ------------------------------------------------------------------ adapters

    def update_layer(self, adapter_name: str, config: MoReSConfig, **kwargs: Any) -> None:
        """Add an adapter."""
        self.mores_steering[adapter_name] = Steering(
            self.hidden_size,
            config.rank,
            tied=config.tie_projections,
            with_bias=config.steering_bias,
            init=config.init,
            dropout=config.dropout,
            device=self._device(),
        )
        self.configs[adapter_name] = config
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _device(self) -> torch.device | None:
        for name, parameter in self.owner.named_parameters():
            if not name.startswith(f"{CHILD}."):
                return parameter.device
        return None

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Called by PEFT after loading. Keeps fp32, where PEFT's own version would cast to the base's dtype."""
        device = device or self._device()
        if adapter_name in self.mores_steering and device is not None and device.type != "meta":
            adapter: Any = self.mores_steering[adapter_name]
            if not adapter.weight.is_meta:
                adapter.to(device)

    def enable_adapters(self, enabled: bool) -> None:
        """As PEFT's; disabling takes merged adapters out at once, since the hook comes after the owner's forward."""
        if not enabled and self.merged:
            self.unmerge()
        super().enable_adapters(enabled)

    # ------------------------------------------------------------------ forward

    def forward(self, hidden: Tensor) -> Tensor:
        """`hidden` `[batch, tokens, D]` with the chosen tokens steered; the others keep every bit."""
        if self.disable_adapters or self.merged:
            return hidden
        for name in self.active_adapters:
            if name in self.mores_steering:
                hidden = self._steered(hidden, name)
        return hidden

    def _steered(self, hidden: Tensor, adapter_name: str) -> Tensor:
        steering = self.mores_steering[adapter_name]
        if self.finder is None:
            return hidden + steering(hidden)
        positions = self.finder.positions(self.configs[adapter_name], hidden)
        if len(positions) == 0 and not (torch.is_grad_enabled() and steering.weight.requires_grad):
            return hidden
        # Also for no token at all in training: DistributedDataParallel waits for every parameter's gradient.
        rows = hidden.reshape(-1, self.hidden_size)
        update = steering(rows.index_select(0, positions))
        return rows.index_add(0, positions, update).view_as(hidden)

    # ------------------------------------------------------------------ merging (site "connector")

    def check_mergeable(self) -> None:
        """
        Raises:
            `NotImplementedError`: if no weight can express the steering.
            `TypeError`: if the steered module is not a plain linear layer.
            `ValueError`: if its bias is needed and missing.
        """
        owner: Any = self.owner
        if self.finder is not None:
            raise NotImplementedError(
                "Steering after decoder layers cannot be merged: it acts on some tokens only, and a weight acts on "
                "all. Keep the adapter, take it out with `unload()`, or train with site='connector', which can be "
                "merged."
            )
        if type(owner) is not nn.Linear or "weight" not in owner._parameters or not owner.weight.is_floating_point():
            raise TypeError(
                f"The connector's last layer is a {type(owner).__name__}, into whose weight steering cannot be "
                "merged; merge or unload the other adapters on it first, and load the model unquantised."
            )

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """
        Fold adapters into the connector's last linear layer: `W ← (I + R(W_s − Rᵀ))W`, and its bias likewise. Keeps
        what was there, so that [`~MoReSLayer.unmerge`] restores every bit.

        Args:
            safe_merge (`bool`, *optional*, defaults to `False`):
                Check for NaN and infinity before anything is written.
            adapter_names (`list[str]`, *optional*): which adapters; by default the active ones.

        Raises:
            `NotImplementedError`, `TypeError`: see [`~MoReSLayer.check_mergeable`].
            `ValueError`: with `safe_merge`, if a merged weight would not be finite; or if the layer lacks a bias.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) or [] if name in self.mores_steering]
        if not names:
            return
        self.check_mergeable()
        owner: Any = self.owner
        weight, bias = owner.weight.detach().double(), None if owner.bias is None else owner.bias.detach().double()
        for name in names:
            up, inner, offset = self.mores_steering[name].factors()  # type: ignore[operator]
            up, inner = up.double(), inner.double()
            weight = weight + up @ (inner @ weight)
            if offset is not None and bias is None and bool(offset.any()):
                raise ValueError(
                    f"Adapter '{name}' adds a bias, but the connector's last layer has none to hold it. Train with "
                    "steering_bias=False to merge into this model."
                )
            if bias is not None:
                moved = inner @ bias if offset is None else inner @ bias + offset.double()
                bias = bias + up @ moved
        new = weight.to(owner.weight.dtype), None if bias is None else bias.to(owner.bias.dtype)
        if safe_merge and not all(bool(torch.isfinite(tensor).all()) for tensor in new if tensor is not None):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {names[-1]} seems to be broken")
        if self._originals is None:
            self._originals = owner.weight.detach().clone(), None if bias is None else owner.bias.detach().clone()
        self._write(*new)
        self.merged_adapters.extend(names)

    @torch.no_grad()
    def unmerge(self, adapter_names: list[str] | None = None) -> None:
        """
        Take adapters out of the connector's weight: every bit as before they were merged.

        Args:
            adapter_names (`list[str]`, *optional*): which ones, in any order; by default all.
        """
        if self._originals is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        kept = [] if adapter_names is None else [name for name in self.merged_adapters if name not in adapter_names]
        self._write(*self._originals)
        self._originals = None
        self.merged_adapters.clear()
        if kept:
            self.merge(adapter_names=kept)

    def _write(self, weight: Tensor, bias: Tensor | None) -> None:
        owner: Any = self.owner
        owner.weight.data.copy_(weight)
        if bias is not None:
            owner.bias.data.copy_(bias)

    def __repr__(self) -> str:
        return f"mores.{super().__repr__()}"


def steer_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Forward hook of a steered module, whose output is the hidden states or a tuple that begins with them."""
    layer: Any = module.get_submodule(CHILD)
    if isinstance(output, tuple):
        return (layer(output[0]), *output[1:])
    return layer(output)


def attach(layer: MoReSLayer) -> None:
    """Make the layer its owner's child and let the owner's output pass through it."""
    layer.train(layer.owner.training)
    layer.owner.add_module(CHILD, layer)
    layer.owner.register_forward_hook(steer_output)


def detach(layer: MoReSLayer) -> None:
    """Undo [`attach`]. The hook is found by what it is: a copied model has no handle to it."""
    owner = layer.owner
    delattr(owner, CHILD)
    remove_hooks(owner, steer_output)


def steer_outside_checkpoints(decoder: nn.Module, args: Any) -> None:
    """
    Forward pre-hook of the decoder. Torch's `CheckpointWrapper`, unlike gradient checkpointing of transformers,
    repeats a layer's hooks in the backward pass, when the tokens are not known any more. So where a layer has got such
    a wrapper, as accelerate's FSDP puts on, the wrapper's output is steered; of several, that of the outermost.
    """
    if torch.compiler.is_compiling():
        return
    for wrapper in decoder.modules():  # from the outside in
        inner: Any = wrapper if isinstance(wrapper, CheckpointWrapper) else None
        while isinstance(inner, ActivationWrapper):
            inner = inner._checkpoint_wrapped_module
            if steer_output in inner._forward_hooks.values():
                remove_hooks(inner, steer_output)
                wrapper.register_forward_hook(steer_output)


def remove_hooks(module: nn.Module, hook: Callable[..., Any]) -> None:
    """Remove a function or a bound method, or `functools.partial` of it, from a module's forward and pre-hooks."""
    for table in (module._forward_hooks, module._forward_pre_hooks):
        for key in [key for key, registered in table.items() if getattr(registered, "func", registered) == hook]:
            del table[key]
            for flags in (
                "_forward_hooks_with_kwargs",
                "_forward_hooks_always_called",
                "_forward_pre_hooks_with_kwargs",
            ):
                getattr(module, flags).pop(key, None)
