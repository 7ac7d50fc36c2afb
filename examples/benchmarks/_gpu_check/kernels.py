"""
Every Triton kernel in every configuration that can be chosen, against dense matrices in fp64.

A group is one shape in one dtype. Groups run in processes of their own, several at once: a kernel that reads where it
must not ends its own group only, and what they compile lies in Triton's cache for the later stages.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from peft_ext.sparse.ops.gpu import kernels
from peft_ext.sparse.ops.reference import dense_delta
from peft_ext.sparse.support import Support, support_of

from .processes import each
from .record import Record, Row, said


# Rows, fan-in, k ("uneven": the entries lie anywhere, most on few inputs), numbers of tokens.
LLAMA = [
    (rows, fan_in, k, (1000, 1)) for k in (1, 20, 4) for rows, fan_in in ((4096, 4096), (14336, 4096), (4096, 14336))
]
OTHERS = [(1024, 4096, 20, (1000, 1)), (4096, 4096, "uneven", (1000, 1)), (333, 1001, 7, (77,))]
GROUPS = [
    *((*shape, dtype) for shape in (*OTHERS, *LLAMA) for dtype in ("bfloat16", "float32")),
    *((*shape, "float16") for shape in (*OTHERS, *LLAMA[1:6:2])),
]
# The same, and the number of experts that the tokens go to: layers of Qwen3-MoE, gpt-oss and Mixtral.
EXPERTS = [
    (2048, 768, 1, (8000, 8), "bfloat16", 128),
    (2048, 768, 20, (8000, 8), "bfloat16", 128),
    (5760, 2880, 20, (4000,), "bfloat16", 8),
    (4096, 14336, 4, (2000,), "float32", 4),
    (333, 1001, "uneven", (777,), "float16", 5),
]
GROUPS = [*GROUPS[:2], *EXPERTS, *GROUPS[2:]]
TINY = [
    (6, 9, 1, (5,), "float32"), (6, 9, 7, (1,), "float16"), (7, 33, "uneven", (1,), "float32"),
    (6, 9, 2, (9,), "float32", 3),
]  # fmt: skip
GROUP_SECONDS = 90
NAMES = ("rows", "fan_in", "k", "tokens", "dtype", "experts")


def support(rows: int, fan_in: int, k: int | str, device: torch.device) -> Support:
    generator = torch.Generator(device).manual_seed(0)
    scores = torch.rand(rows, fan_in, generator=generator, device=device)
    if k != "uneven":
        return Support(scores.topk(int(k)).indices.sort(1).values.to(torch.int32), fan_in)
    scores[rows // 2 :] **= 4  # rows of few entries
    scores[:, : max(1, fan_in // 500)] += 0.5  # inputs that most rows read
    return support_of((scores > 0.99).view(-1).nonzero().view(-1), rows, fan_in)


def loads(tokens: int, experts: int, generator: torch.Generator, device: torch.device) -> list[int]:
    """How many tokens each expert has: none, very many, and a few left over for none of them."""
    chances = torch.rand(experts + 1, generator=generator, device=device) ** 4
    chances[experts // 2] = 0
    drawn = torch.multinomial(chances, tokens, replacement=True, generator=generator)
    counts: list[int] = drawn.bincount(minlength=experts + 1)[:experts].tolist()
    return counts


class Group:
    """The three products at one shape and number of tokens, and what they should give."""

    def __init__(
        self, rows: int, fan_in: int, k: int | str, tokens: int, dtype: torch.dtype, experts: int, device: torch.device
    ):
        generator = torch.Generator(device).manual_seed(1)

        def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device).to(dtype)

        self.support = support(max(1, experts) * rows, fan_in, k, device)
        self.loads = loads(tokens, experts, generator, device) if experts else [tokens]
        of_experts = torch.tensor(self.loads, device=device).cumsum(0).to(torch.int32) if experts else None
        self.values = draw(*self.support.indices.shape, dtype=torch.float32)
        self.x, self.y = draw(tokens, fan_in), draw(tokens, rows)
        indices, offsets = self.support.indices, self.support.offsets
        entries, ends = self.support.transposed(max(1, experts))
        launch = kernels()
        numbers = None if offsets is None else launch.rows_of(indices, offsets)

        def poisoned(like: Tensor) -> Tensor:
            return torch.full_like(like, torch.nan)

        self.products: dict[str, Callable[[], Tensor]] = {
            "forward": lambda: launch.add(self.y, self.x, self.values, indices, offsets, poisoned(self.y), of_experts),
            "forward in place": lambda: launch.add(
                y := self.y.clone(), self.x, self.values, indices, offsets, y, of_experts
            ),
            "grad input": lambda: launch.grad_input(
                self.y, self.values, indices, numbers, entries, ends, poisoned(self.x), of_experts
            ),
            "grad values": lambda: launch.grad_values(self.y, self.x, indices, numbers, of_experts),
        }

    def exact(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Each product with the sums of its terms' magnitudes."""
        both = []
        for sign in (lambda t: t, torch.abs):
            x, y, values = (sign(t.double()) for t in (self.x, self.y, self.values))
            update = dense_delta(values, self.support.indices, self.support.fan_in, self.support.offsets)
            forward, grad_input, grad_weight = y.clone(), torch.zeros_like(x), torch.zeros_like(update)
            start, rows = 0, y.shape[1]
            for expert, load in enumerate(self.loads):
                tokens, own = slice(start, start + load), slice(expert * rows, (expert + 1) * rows)
                forward[tokens] += x[tokens] @ update[own].t()
                grad_input[tokens] = y[tokens] @ update[own]
                grad_weight[own] = y[tokens].t() @ x[tokens]
                start += load
            gradients = {"grad input": grad_input, "grad values": self.support.gather(grad_weight)}
            both.append({"forward": forward, "forward in place": forward, **gradients})
        return {name: (value, both[1][name]) for name, value in both[0].items()}


def worst(found: Tensor, exact: Tensor, magnitude: Tensor) -> float:
    """Largest difference relative to the sum of the magnitudes of an element's terms; NaN if anything is NaN."""
    floor = torch.finfo(found.dtype).tiny  # below it, numbers are equally spaced
    return ((found.double() - exact).abs() / magnitude.clamp_min(floor)).max().item()


def bound(dtype: torch.dtype) -> float:
    """Sums in fp32, rounded once."""
    return torch.finfo(dtype).eps / 2 + 64 * torch.finfo(torch.float32).eps


@contextmanager
def only(number: int, experts: int) -> Iterator[list[Any]]:
    """Let launches run with the `number`th of their candidates; yields all of them, once a launch was made."""
    launch, every = kernels(), []

    def restricted(candidates: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
        def some(*sizes: Any) -> list[Any]:
            every[:] = candidates(*sizes)
            return every[number : number + 1]

        return some

    with ExitStack() as stack:
        for name in ("unstaged",) if experts else ("sum_configs", "value_configs"):
            stack.enter_context(mock.patch.object(launch, name, restricted(getattr(launch, name))))
        yield every


def outcome(product: Callable[[], Tensor], expected: tuple[Tensor, Tensor]) -> Row:
    """Status of one launch: ok, wrong, error, or dropped (more than the device has: the tuner leaves it out)."""
    from triton.runtime.errors import OutOfResources, PTXASError

    begin = time.perf_counter()
    try:
        found = product()
        difference = worst(found, *expected)
    except (OutOfResources, PTXASError) as error:
        return {"status": "dropped", "message": said(error)}
    except Exception as error:
        return {"status": "error", "message": said(error)}
    right = difference <= bound(found.dtype)  # a NaN is wrong
    row = {"status": "ok" if right else "wrong", "worst": difference, "allowed": bound(found.dtype)}
    return {**row, "seconds": time.perf_counter() - begin}


def run_group(
    device: str, out: Path, rows: int, fan_in: int, k: int | str, all_tokens: Sequence[int], dtype: str,
    experts: int = 0,
) -> None:  # fmt: skip
    """Append every case of a group to a file, a line of JSON each."""
    for tokens in all_tokens:
        group = Group(rows, fan_in, k, tokens, getattr(torch, dtype), experts, torch.device(device))
        exact = group.exact()
        for name, product in group.products.items():
            number, configs = 0, [None]
            while number < len(configs):
                with only(number, experts) as configs:
                    found = outcome(product, exact[name])
                sizes = dict(zip(NAMES, (rows, fan_in, k, tokens, dtype, experts), strict=True))
                config = str(configs[number]) if configs else "?"
                with out.open("a") as file:
                    file.write(json.dumps({**sizes, "product": name, "config": config, **found}) + "\n")
                if found["status"] == "error" and "CUDA error" in found["message"]:
                    raise RuntimeError("nothing runs in this process any more")
                number += 1


def run(record: Record, args: argparse.Namespace) -> None:
    groups = TINY if args.tiny else GROUPS
    workers = max(1, min(len(groups), (os.cpu_count() or 1) - 1))
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{number}" for number in range(len(groups))]
        works = [partial(run_group, args.device, file, *group) for group, file in zip(groups, files, strict=True)]
        for number, how in each(works, workers, lambda: min(record.seconds_left - 3, GROUP_SECONDS)):
            keep(record, groups[number], files[number], how)


def keep(record: Record, group: tuple[Any, ...], file: Path, how: str) -> None:
    """The cases of a group that has ended, and how it did if not by itself."""
    if how.startswith("left out"):
        record.content["left_out"].append(str(group))
        return
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    if not how.startswith("ended"):
        rows.append(dict(zip(NAMES, group, strict=False)) | {"status": "error", "message": how})
    record.content["results"] += rows
    record.write()
    states = [row["status"] for row in rows]
    counts = {state: states.count(state) for state in dict.fromkeys(states)}
    print(f"[kernels {record.seconds_left:.0f} s left] {group} {how}: {counts}", flush=True)
    for row in rows:
        if row["status"] in ("error", "wrong"):
            print(f"    {row}", flush=True)
