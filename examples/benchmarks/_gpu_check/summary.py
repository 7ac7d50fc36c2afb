"""What the stages' files hold, in one screen."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _common.tables import mebibytes, table


SHOWN = 12  # failures of a stage
PRODUCTS = ("forward", "forward in place", "grad input", "grad values")

Row = dict[str, Any]


def kernels(results: Sequence[Row]) -> list[str]:
    kinds: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in results:
        family = "?" if "config" not in row else "staged" if "block_tokens=0" in row["config"] else "direct"
        family += " experts" * bool(row.get("experts"))
        kinds[row.get("product", "(process)"), family, row["dtype"]].append(row)
    lines = []
    for (product, family, dtype), rows in sorted(kinds.items()):
        states = [row["status"] for row in rows]
        worst = max((row["worst"] / row["allowed"] for row in rows if "worst" in row), default=float("nan"))
        counts = {state: str(states.count(state)) for state in ("ok", "wrong", "error", "dropped")}
        lines.append({"kernel": f"{product}, {family}, {dtype}", **counts, "worst / allowed": f"{worst:.2f}"})
    failed = [row for row in results if row["status"] != "ok"]
    return [table(lines), *(str(row)[:400] for row in failed[:SHOWN])]


def bandwidth(results: Sequence[Row]) -> list[str]:
    cases: dict[str, dict[str, Row]] = defaultdict(dict)
    for row in results:
        if "product" in row:
            case = f"{row['dtype']} {row['fan_in']}->{row['rows']} k={row['k']} tokens={row['tokens']}"
            cases[case][row["product"]] = row
    lines = []
    for case, products in cases.items():
        line = {"µs (copy of as many bytes / it)": case}
        for name in PRODUCTS:
            row = products.get(name)
            line[name] = f"{row['microseconds']:.1f} ({row['share_of_same_copy']:.2f})" if row else ""
        lines.append(line)
    return [table(lines)] if lines else []


def steps(results: Sequence[Row]) -> list[str]:
    lines = [
        {
            "step": row["method"] + " checkpointed" * row["checkpointing"],
            "layers": str(row["layers"]),
            "ms": f"{row['milliseconds']:.1f}",
            **{
                f"/ {other}": f"{row[f'over {other}']:.3f}" if f"over {other}" in row else ""
                for other in ("lora-r8", "frozen")
            },
            "peak, MiB": mebibytes(row["peak_bytes"]),
            "optimiser": mebibytes(row["optimizer_bytes"]),
            "resident": mebibytes(row["resident_bytes"]),
        }
        for row in results
        if "milliseconds" in row
    ]
    return [table(lines)] if lines else []


def experts(results: Sequence[Row]) -> list[str]:
    lines = [
        {
            "step on experts": f"{row['block']} {row['method']}",
            "ms": f"{1000 * row['seconds']['median']:.1f}",
            **{f"/ {other}": f"{ratio['median']:.3f}" for other, ratio in row["ratios"].items()},
            "peak, MiB": mebibytes(row["peak_bytes"]),
            "optimiser": mebibytes(row["optimizer_bytes"]),
        }
        for row in results
        if "seconds" in row
    ]
    return [table(lines)] if lines else []


def startup(results: Sequence[Row]) -> list[str]:
    names = ("choosing", "saving", "merging", "unmerging", "loading")
    lines = [
        {
            "seconds": f"{row['method']} {row.get('round', '')}",
            **{name: f"{row[name]:.3f}" if name in row else "" for name in names},
            **{
                name.replace("_bytes", ", MiB"): mebibytes(row[name]) if name in row else ""
                for name in ("choosing_peak_bytes", "loading_peak_bytes", "file_bytes")
            },
        }
        for row in results
        if "choosing" in row
    ]
    return [table(lines)] if lines else []


def crossovers(results: Sequence[Row]) -> list[str]:
    found = [row for row in results if "auto_over_best" in row]
    near = sum(row["auto_over_best"] <= 1.1 for row in found)
    lines = [f"auto is within 10 % of the best path at {near} of {len(found)} points; the worst:"]
    for row in sorted(found, key=lambda row: -row["auto_over_best"])[:8]:
        times = ", ".join(f"{path} {1000 * time:.3f}" for path, time in row["seconds"].items())
        sizes = " ".join(f"{name}={row[name]}" for name in ("uneven", "rows", "fan_in", "k", "tokens"))
        lines.append(f"{sizes}: auto {row['auto']} {row['auto_over_best']:.2f} of the best; ms: {times}")
    return lines


def suite(results: Sequence[Row]) -> list[str]:
    lines = []
    for row in results:
        if "outcomes" in row:
            lines += [f"{row['ended']}: {row['outcomes']}", *(line[:300] for line in row["failed"][:SHOWN])]
            lines += [row["tail"][-600:]] if not row["outcomes"] else []
    return lines


TABLES = {
    "kernels": kernels, "bandwidth": bandwidth, "steps": steps, "experts": experts, "startup": startup,
    "crossovers": crossovers, "suite": suite,
}  # fmt: skip


def summary(out: Path, ended: Mapping[str, str]) -> str:
    """Every stage that ran: how it ended, its table, its errors."""
    parts = []
    for name, how in ended.items():
        parts.append(f"\n== {name} {how}")
        path = out / f"{name}.json"
        if not path.exists():
            continue
        content = json.loads(path.read_text())
        results = content["results"]
        parts += TABLES[name](results) if results else []
        parts += [f"FAILED {row}"[:500] for row in results if row.get("failed")][:SHOWN]
        if isinstance(content.get("gate"), str):
            parts.append(f"GATE {content['gate']}")
        else:
            parts += [f"GATE {check}" for check in content.get("gate", []) if not check["passed"]]
        if content["left_out"]:
            parts.append(f"left out for want of time: {len(content['left_out'])} cases")
    return "\n".join(parts)
