"""What a stage found, in its file after every case: whatever ends the stage, the cases before it are kept."""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from _common.report import environment, write_report


MESSAGE = 600  # characters of an error that are kept

Row = dict[str, Any]


class Broken(RuntimeError):
    """The device takes no more work from this process."""


def said(error: BaseException) -> str:
    """An error in one line: compilers' messages are long, and what is wrong stands at their start or end."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= MESSAGE else f"{text[: MESSAGE // 2]} [...] {text[-MESSAGE // 2 :]}"


def named(case: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in case.items())


class Record:
    """
    The results of one stage.

    Args:
        stage (`str`): Its name, which the file in `args.out` bears.
        args (`argparse.Namespace`): `device`, `out` and others that stages read.
        seconds (`float`): that the stage has from now on.
    """

    def __init__(self, stage: str, args: argparse.Namespace, seconds: float) -> None:
        self.device = torch.device(args.device)
        self.path = Path(args.out) / f"{stage}.json"
        self.end = time.monotonic() + seconds
        self.content: Row = {"environment": None, "finished": False, "results": [], "left_out": []}

    def write(self) -> None:
        write_report(self.path, self.content)

    @property
    def seconds_left(self) -> float:
        return self.end - time.monotonic()

    def add(self, row: Row) -> None:
        """Keep and print one case."""
        self.content["environment"] = self.content["environment"] or environment(self.device)
        self.content["results"].append(row)
        self.write()
        print(f"[{self.path.stem} {self.seconds_left:.0f} s left] {brief(row)}", flush=True)

    def attempt(self, case: Mapping[str, Any], work: Callable[[], Row | Sequence[Row]]) -> bool:
        """
        Run a case if there is time, and keep what it gives or the error that ended it.

        Returns:
            `bool`: whether it ran to its end.

        Raises:
            `Broken`: if the device takes no more work after it.
        """
        if self.seconds_left <= 0:
            self.content["left_out"].append(named(case))
            return False
        try:
            found = work()
        except Exception as error:
            self.add({**case, "failed": said(error)})
            del error
            free(self.device)
            return False
        for row in [found] if isinstance(found, dict) else found:
            self.add({**case, **row})
        return True

    def finish(self) -> None:
        self.content["environment"] = self.content["environment"] or environment(self.device)
        self.content["finished"] = not self.content["left_out"]
        self.write()


def free(device: torch.device) -> None:
    """Give back what a failed case held, and see whether the device still answers."""
    gc.collect()
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    except RuntimeError as error:
        raise Broken(said(error)) from error


def brief(row: Mapping[str, Any]) -> str:
    """A row in a line: no raw times, numbers of three digits."""
    shown = {name: value for name, value in row.items() if not isinstance(value, (list, dict))}
    return named({name: f"{value:.3g}" if isinstance(value, float) else value for name, value in shown.items()})
