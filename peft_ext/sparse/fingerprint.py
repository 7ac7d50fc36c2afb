"""The fingerprint of a base weight: what its values at an adapter's entries were when the entries were chosen."""

from __future__ import annotations

import torch
from torch import Tensor


# Fingerprint layout, int64[6]: rows, fan_in, dtype code, checksum of the bits, and the raw bits of two float64 sums
# with pseudo-random signs. Of a weight that could not be read, dtype code, checksum and sums are zero. The dtype code
# of a dequantised weight has a further bit.
FINGERPRINT_LENGTH = 6
_DTYPE_CODES = {
    torch.float32: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.float64: 4,
    torch.float8_e4m3fn: 5,
    torch.float8_e5m2: 6,
    torch.float8_e4m3fnuz: 7,
    torch.float8_e5m2fnuz: 8,
}
_COARSE = {5, 6, 7, 8}
_DEQUANTISED = 2**8
_SUMMED_AT_ONCE = 2**20  # numbers, of which a checksum needs 16 bytes each
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes per element
# How far a signed sum may move, in units of the values' 2-norm. A cast to bf16 moves each value by at most 2^-9
# relative, independently; one to 8 bits moves the sum by some hundredths, one to 4 bits by 0.04 (NF4, k=1) to 0.1
# (FP4, k=20) as a root mean square, and a model may have hundreds of weights; an unrelated weight by about 1.4.
CAST_TOLERANCE = 8 * 2.0**-9
COARSE_TOLERANCE = 0.3
QUANTISED_TOLERANCE = 0.6


def fingerprint_of(values: Tensor, rows: int, fan_in: int, quantised: bool = False) -> Tensor:
    """The fingerprint of a weight `[rows, fan_in]` with these values `[entries]`, int64 `[6]` on the CPU."""
    code = _DTYPE_CODES[values.dtype] + _DEQUANTISED * quantised
    head = [rows, fan_in, code, checksum(values)]
    return torch.cat([torch.tensor(head, dtype=torch.int64), _sums(values).view(torch.int64)])


def unknown_fingerprint(rows: int, fan_in: int) -> Tensor:
    """That of a weight that could not be read."""
    return torch.tensor([rows, fan_in, *[0] * (FINGERPRINT_LENGTH - 2)], dtype=torch.int64)


def is_unknown(fingerprint: Tensor) -> bool:
    """Whether a fingerprint says nothing: the base weight could not be read when the entries were chosen."""
    return int(fingerprint[2]) == 0


def check_fingerprint(fingerprint: Tensor, rows: int, fan_in: int) -> None:
    """
    Raises:
        `ValueError`: if no weight `[rows, fan_in]` has such a fingerprint.
    """
    if fingerprint.dtype != torch.int64:
        raise ValueError(f"it is {fingerprint.dtype} instead of torch.int64")
    stored_rows, stored_fan_in, code, *rest = fingerprint.tolist()
    if (stored_rows, stored_fan_in) != (rows, fan_in):
        raise ValueError(f"it is that of a {stored_rows}x{stored_fan_in} weight instead of {rows}x{fan_in}")
    if code % _DEQUANTISED not in _DTYPE_CODES.values() and (code, *rest) != (0,) * (FINGERPRINT_LENGTH - 2):
        raise ValueError(f"it has {code} for the weight's dtype")
    if not bool(torch.isfinite(fingerprint[4:].view(torch.float64)).all()):
        raise ValueError("its sums of weights are not finite")


def difference(stored: Tensor, values: Tensor, quantised: bool) -> str | None:
    """How values differ from those of a fingerprint, by more than rounding explains; see [`Support.mismatch`]."""
    code = _DTYPE_CODES[values.dtype] + _DEQUANTISED * quantised
    quantised |= int(stored[2]) >= _DEQUANTISED
    if not quantised and int(stored[2]) == code:
        if int(stored[3]) == checksum(values):  # the usual case, which takes a third of the sums' time
            return None
        tolerance, explained = 0.0, ""
    else:
        coarse = not _COARSE.isdisjoint((int(stored[2]), code))
        tolerance = QUANTISED_TOLERANCE if quantised else COARSE_TOLERANCE if coarse else CAST_TOLERANCE
        explained = f", by more than {'quantisation' if quantised else 'a change of dtype'} explains"
    distance = moved(stored, values)
    if tolerance and distance <= tolerance:
        return None
    if distance <= COARSE_TOLERANCE:
        explained += (
            f" (near them: sums within {distance:.1e} of their norm, as of a model that was trained further, "
            "or of the original of a quantised one)"
        )
    return f"other values at the adapter's entries{explained}"


def moved(stored: Tensor, values: Tensor) -> float:
    """Distance of the values' sums from those of a fingerprint, relative to the values' 2-norm."""
    norm = float(values.double().norm())
    difference = float((stored[4:].view(torch.float64) - _sums(values)).abs().max())
    return difference / norm if norm else float("inf") if difference else 0.0


def checksum(values: Tensor) -> int:
    """
    Of the bits of all numbers, in their order. Odd multipliers make it depend on the order; int64 wraps, so it is
    exact on every device.
    """
    bits = values.reshape(-1).contiguous().view(_BITS[values.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for start in range(0, len(bits), _SUMMED_AT_ONCE):
        part = bits[start : start + _SUMMED_AT_ONCE]
        total += torch.arange(2 * start + 1, 2 * (start + len(part)), 2, device=bits.device).mul_(part).sum()
    return int(total)


def _sums(values: Tensor) -> Tensor:
    """Two sums with pseudo-random signs, float64 on the CPU."""
    return (_signs(torch.arange(values.numel(), device=values.device)) @ values.double()).cpu()


def _signs(position: Tensor) -> Tensor:
    """Two rows of ±1, float64 `[2, entries]`, from a hash of the position: equal rounding errors don't add up."""
    mask = 0xFFFFFFFF
    mixed = (position + 1) * 2654435761 & mask
    mixed = (mixed ^ (mixed >> 15)) * 2246822519 & mask
    return torch.stack([(mixed >> 31) & 1, (mixed >> 23) & 1]).double() * 2 - 1
