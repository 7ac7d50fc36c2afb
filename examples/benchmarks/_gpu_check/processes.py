"""
Work in forked processes: what they need is imported once, what they break is their own, and they can be ended.

A process that has touched CUDA must not fork children that do: see `device_answers`.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence

import torch


POLL = 0.05  # seconds


def start(work: Callable[[], object]) -> int:
    """Run `work` in a new process, first of a group of its own; its number."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.setsid()
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def end(pid: int) -> None:
    """End a process and all that it started."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def each(
    works: Sequence[Callable[[], object]], at_once: int, seconds: Callable[[], float]
) -> Iterator[tuple[int, str]]:
    """
    Run every work in a process of its own.

    Args:
        works: what to run.
        at_once (`int`): how many of them.
        seconds: gives the time that a process started now has; without any left the rest is not started.

    Yields:
        Number of a work and how it ended, in the order that they end in.
    """
    waiting, running = list(enumerate(works)), dict[int, tuple[int, float, float]]()
    while waiting or running:
        while waiting and len(running) < at_once:
            number, work = waiting.pop(0)
            allowed = seconds()
            if allowed <= 0:
                yield number, "left out: no time"
                continue
            running[start(work)] = (number, time.monotonic(), allowed)
        for pid, (number, begin, allowed) in list(running.items()):
            took = time.monotonic() - begin
            reaped, status = os.waitpid(pid, os.WNOHANG)
            if not reaped and took <= allowed:
                continue
            end(pid)  # with what it left running
            if not reaped:
                os.waitpid(pid, 0)
            del running[pid]
            how = "stopped" if not reaped else "ended" if status == 0 else f"failed ({status_text(status)})"
            yield number, f"{how} after {took:.0f} s of {allowed:.0f}"
        time.sleep(POLL)


def status_text(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return f"status {code}" if code >= 0 else signal.Signals(-code).name


def device_answers(device: str) -> bool:
    """Whether a forked process can use the device: not if something imported here has touched CUDA already."""
    (found,) = each([lambda: torch.ones(1, device=device).item()], 1, lambda: 60.0)
    return found[1].startswith("ended")
