"""Where and with what a benchmark ran, and the file with its results."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from peft_ext.io import write_atomically

from .tables import mebibytes as mebibytes
from .tables import table as table


PACKAGES = ("torch", "peft", "transformers", "peft-ext", "triton")


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """The CPU's model name; `platform` knows only its architecture on Linux."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def environment(device: torch.device) -> dict[str, Any]:
    """What a reader needs to know to repeat the run."""
    return {
        "argv": sys.argv[1:],
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "packages": {package: version(package) for package in PACKAGES},
        "processor": processor(),
        "accelerator": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def write_report(path: Path, content: Mapping[str, Any]) -> None:
    """Write results as JSON, into a new folder if need be; an interruption leaves an old file whole."""
    text = json.dumps(content, indent=1) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(str(path), text)
