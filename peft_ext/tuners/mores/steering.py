"""The steering itself: h' = h + R (W h + b − Rᵀ h), with R kept orthonormal by how it is computed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


INITIALISATIONS = ("identity", "random")


def orthonormal(raw: Tensor) -> Tensor:
    """
    The orthonormal factor of a tall matrix's QR decomposition, with the triangular factor's diagonal made positive.

    The result depends on the directions of `raw` and not on its scale: multiplying `raw` by a positive number, as
    decoupled weight decay does, changes nothing. It is orthonormal to rounding whatever an optimiser does to `raw`.

    Args:
        raw (`torch.Tensor`): `[D, r]` with D ≥ r and full rank, any floating dtype.

    Returns:
        `torch.Tensor`: `[D, r]`, in fp32 or wider.
    """
    dtype = torch.promote_types(raw.dtype, torch.float32)
    # In fp64 and rounded once: fp32's QR of 4096 x 8 leaves RᵀR 1.1e-6 from I. Apple's GPUs have no fp64.
    exact = dtype if raw.device.type == "mps" else torch.float64
    with torch.autocast(raw.device.type, enabled=False):
        factor, triangle = torch.linalg.qr(raw.to(exact))
        return (factor * torch.where(triangle.diagonal() < 0, -1.0, 1.0)).to(dtype)


class Steering(nn.Module):
    """
    The parameters of one adapter at one place, and their map (MoReS, eqs. 3–4). `2·D·r` numbers and a bias of r; no
    buffers.

    Args:
        hidden_size (`int`): D.
        rank (`int`): r, at most D.
        tied (`bool`, *optional*, defaults to `True`):
            One matrix R projects down and up again, as in the published code. Otherwise a second orthonormal matrix,
            `raw_down`, projects down.
        with_bias (`bool`, *optional*, defaults to `True`): whether b is there.
        init (`str`, *optional*, defaults to `"identity"`):
            `"identity"`: W starts as the down projection and b as zero, so that nothing is changed. `"random"`: W and
            b start as an `nn.Linear` does, as in the published code.
        dropout (`float`, *optional*, defaults to 0.0): on the update, in training.
        device (`torch.device`, *optional*): of the parameters, which are fp32.

    Attributes:
        raw_up (`nn.Parameter`): `[D, r]`; `orthonormal(raw_up)` is R.
        raw_down (`nn.Parameter`, *optional*): `[D, r]`, if not tied.
        weight (`nn.Parameter`): W, `[r, D]`.
        bias (`nn.Parameter`, *optional*): b, `[r]`.
    """

    def __init__(
        self,
        hidden_size: int,
        rank: int,
        tied: bool = True,
        with_bias: bool = True,
        init: str = "identity",
        dropout: float = 0.0,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.raw_up = nn.Parameter(torch.empty(hidden_size, rank, device=device))
        self.raw_down = None if tied else nn.Parameter(torch.empty(hidden_size, rank, device=device))
        self.weight = nn.Parameter(torch.empty(rank, hidden_size, device=device))
        self.bias = nn.Parameter(torch.empty(rank, device=device)) if with_bias else None
        if not self.weight.is_meta:
            self.reset_parameters(init)

    @torch.no_grad()
    def reset_parameters(self, init: str) -> None:
        """Draw random directions, then W and b as `init` says."""
        for raw in (self.raw_up, self.raw_down):
            if raw is not None:
                # Unit columns: the optimiser's steps then turn R by about their own length.
                raw.copy_(orthonormal(nn.init.normal_(raw)))
        if init == "identity":
            self.weight.copy_(self.down().T)  # the very numbers that are subtracted, so that the difference is zero
        else:
            nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        if self.bias is not None:
            bound = 0.0 if init == "identity" else self.weight.shape[1] ** -0.5
            nn.init.uniform_(self.bias, -bound, bound)

    def up(self) -> Tensor:
        """R: `[D, r]`, orthonormal columns."""
        return orthonormal(self.raw_up)

    def down(self) -> Tensor:
        """The down projection, transposed: `[D, r]`. R if tied."""
        return orthonormal(self.raw_up if self.raw_down is None else self.raw_down)

    def factors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """`(R [D, r], W − Rᵀ [r, D], b [r])`: the update is `R ((W − Rᵀ) h + b)`."""
        up = self.up()
        down = up if self.raw_down is None else self.down()
        dtype = up.dtype
        return up, self.weight.to(dtype) - down.T, None if self.bias is None else self.bias.to(dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        """The update for `hidden` `[..., D]`, in its dtype; computed in fp32 or wider."""
        if self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self.keep_scale()
        with torch.autocast(hidden.device.type, enabled=False):
            up, inner, bias = self.factors()
            update = F.linear(F.linear(hidden.to(up.dtype), inner, bias), up)  # [..., r] -> [..., D]
            return F.dropout(update, self.dropout, self.training).to(hidden.dtype)

    @torch.no_grad()
    def keep_scale(self) -> None:
        """
        Bring the raw matrices back to a moderate size when weight decay has shrunk them, or an optimiser's steps have
        grown them, so much that they might leave fp32's range. Multiplies by a power of two, which leaves every bit
        of R as it is.
        """
        for raw in (self.raw_up, self.raw_down):
            if raw is not None:
                largest = raw.abs().amax()
                factor = torch.where(largest < 2.0**-20, 2.0**20, 1.0) * torch.where(largest > 2.0**20, 2.0**-20, 1.0)
                # `data`: a graph that still awaits its backward holds R and the triangle, not this tensor.
                raw.data.mul_(factor.to(raw.dtype))

    def extra_repr(self) -> str:
        rank, hidden_size = self.weight.shape
        tied, bias = self.raw_down is None, self.bias is not None
        return f"hidden_size={hidden_size}, rank={rank}, tied={tied}, bias={bias}, dropout={self.dropout}"
