"""A module of experts whose products can be added to: its own forward runs on a view of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .experts import ExpertBank, bank_names, scale_of


# Takes what a bank computed of its tokens, the tokens (both sorted by expert) and where those of each expert end.
Added = Callable[[Tensor, Tensor, Tensor], Tensor]

# Of transformers, those that compute with operators of torch.
IMPLEMENTATIONS = ("grouped_mm", "batched_mm", "eager")
_ROWS_FIRST = (F.linear,)  # multiply by the transpose of the weight that they are given
_PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm)
_SEEN = ("shape", "dtype", "device", "ndim", "is_cuda", "size", "dim", "data_ptr", "is_contiguous", "stride")


class BankProduct:
    """
    Stands for a bank's weight, or with `weight` and `experts` (a number, or one for each token) for a part of it,
    inside the forward of its experts. It can be indexed by an expert or by the experts of all tokens, transposed, and
    multiplied by; to each product `added` adds what it wants. `columns`: neurons are the columns of `weight`.
    """

    def __init__(
        self,
        bank: ExpertBank,
        added: Added,
        weight: Tensor | None = None,
        experts: Tensor | None = None,
        columns: bool | None = None,
    ) -> None:
        self.bank, self.added = bank, added
        self.weight = bank.parameter if weight is None else weight
        self.experts = experts
        self.columns = bank.is_transposed if columns is None else columns

    def __getattr__(self, name: str) -> Any:
        if name in _SEEN:
            return getattr(self.weight, name)
        raise AttributeError(_unknown(self.bank, f"asks for `{name}` of"))

    def __getitem__(self, experts: Any) -> BankProduct:
        if self.experts is not None or not isinstance(experts, (int, Tensor)):
            raise NotImplementedError(_unknown(self.bank, f"takes [{experts!r}] of"))
        numbers = torch.as_tensor(experts, device=self.weight.device)
        return BankProduct(self.bank, self.added, self.weight[experts], numbers, self.columns)

    def transpose(self, *dims: int) -> BankProduct:
        """The last two dimensions exchanged."""
        if {dim % self.weight.dim() for dim in dims} != {self.weight.dim() - 2, self.weight.dim() - 1}:
            raise NotImplementedError(_unknown(self.bank, f"transposes dimensions {dims} of"))
        return BankProduct(self.bank, self.added, self.weight.transpose(*dims), self.experts, not self.columns)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Tensor:
        kwargs = kwargs or {}
        place = next(i for i, argument in enumerate(args) if isinstance(argument, BankProduct))
        product: BankProduct = args[place]
        plain = [product.weight if i == place else argument for i, argument in enumerate(args)]
        ends = kwargs.get("offs")  # of grouped products, by whatever function
        if ends is None and function not in _ROWS_FIRST and function not in _PRODUCTS:
            raise NotImplementedError(_unknown(product.bank, f"calls {getattr(function, '__name__', function)} with"))
        if product.columns == (function in _ROWS_FIRST or place == 0):
            raise NotImplementedError(_unknown(product.bank, "multiplies by the other side of"))
        x = plain[1 - place]
        return product.add_to(function(*plain, **kwargs), x, ends)

    def add_to(self, result: Tensor, x: Tensor, ends: Tensor | None) -> Tensor:
        """`result`, which is x times this weight, and what is added to it."""
        bank = self.bank
        rows, tokens = result.reshape(-1, bank.rows), x.reshape(-1, bank.in_features)
        if self.experts is not None and self.experts.dim():  # an expert for each token, in any order
            order = self.experts.argsort(stable=True)
            numbers = torch.arange(bank.number, device=order.device)
            ends = torch.searchsorted(self.experts[order], numbers, right=True)
            added = self.added(rows[order], tokens[order], ends)
            return added[order.argsort()].view(result.shape)
        if self.experts is not None:
            ends = (torch.arange(bank.number, device=x.device) >= self.experts) * len(rows)
        elif ends is None:  # equally many tokens for each expert
            ends = torch.arange(1, bank.number + 1, device=x.device) * (len(rows) // bank.number)
        return self.added(rows, tokens, ends).view(result.shape)


def _unknown(bank: ExpertBank, what: str) -> str:
    owner = bank.owner
    implementation = getattr(getattr(owner, "config", None), "_experts_implementation", None)
    return (
        f"{type(owner).__name__} (experts_implementation={implementation!r}) {what} its '{bank.name}', so that it is "
        "not known what adapters on it should add. Choose another implementation, "
        "model.set_experts_implementation('grouped_mm'), 'batched_mm' or 'eager', or leave the experts out with "
        f"`exclude_modules=['{bank.name}']`."
    )


class ExpertsView:
    """
    A module of experts, which is not changed, with something else in the place of some of its attributes, for its own
    forward to run on.
    """

    def __init__(self, experts: nn.Module, replaced: Mapping[str, Any]) -> None:
        self.experts, self.replaced = experts, dict(replaced)

    def __getattr__(self, name: str) -> Any:
        if name in self.replaced:
            return self.replaced[name]
        method = getattr(type(self.experts), name, None)
        return partial(method, self) if isinstance(method, FunctionType) else getattr(self.experts, name)

    def linear(self, x: Tensor, weight: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The product of experts in 8-bit floats with one expert's weight, in a method of theirs."""
        kind: Any = type(self.experts)
        if not isinstance(weight, BankProduct):
            return kind.linear(self, x, weight, *args, **kwargs)
        return weight.add_to(kind.linear(self, x, weight.weight, *args, **kwargs), x, None)


class WatchedForward:
    """
    In the place of the forward of a module of experts: shows `watch` what enters the product with each of its banks:
    the bank, its inputs `[tokens, fan_in]`, sorted by expert, and where those of each expert end.
    """

    def __init__(self, experts: nn.Module, watch: Callable[[ExpertBank, Tensor, Tensor], None]) -> None:
        self.experts, self.watch = experts, watch

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return run_with(self.experts, {}, *args, **kwargs)

    def watching(self, added: Mapping[str, tuple[ExpertBank, Added]]) -> dict[str, tuple[ExpertBank, Added]]:
        """What adds to the products, and looks at them before."""
        banks = {name: ExpertBank(self.experts, name) for name in bank_names(self.experts)}
        return {name: (bank, partial(self._see, bank, added.get(name))) for name, bank in banks.items()}

    def _see(
        self, bank: ExpertBank, added: tuple[ExpertBank, Added] | None, result: Tensor, x: Tensor, ends: Tensor
    ) -> Tensor:
        self.watch(bank, x, ends)
        return result if added is None else added[1](result, x, ends)


def run_with(experts: nn.Module, added: Mapping[str, tuple[ExpertBank, Added]], *args: Any, **kwargs: Any) -> Any:
    """
    The forward of a module of experts, as its class computes it; `added` holds by name a bank and what adds to its
    products.
    """
    implementation = getattr(getattr(experts, "config", None), "_experts_implementation", None)
    if implementation not in (None, *IMPLEMENTATIONS):
        raise NotImplementedError(
            f"experts_implementation={implementation!r} may compute in kernels that adapters can't see into. "
            f"Call model.set_experts_implementation with one of {', '.join(map(repr, IMPLEMENTATIONS))}."
        )
    products = dict(added)
    watched = vars(experts).get("forward")
    if isinstance(watched, WatchedForward):
        products = watched.watching(products)
    if implementation not in (None, "eager") and any(scale_of(bank) is not None for bank, _ in products.values()):
        raise NotImplementedError(
            f"experts_implementation={implementation!r} multiplies by 8-bit weights in kernels that adapters can't "
            "see into. Call model.set_experts_implementation('eager')."
        )
    view = ExpertsView(experts, {name: BankProduct(bank, add) for name, (bank, add) in products.items()})
    return type(experts).forward(view, *args, **kwargs)
