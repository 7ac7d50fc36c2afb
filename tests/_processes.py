"""
Scripts and modules in processes of their own. Importing the libraries takes seconds, so these are forked from one
process that has imported them and nothing of this package.
"""

import functools
import json
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch


LIBRARIES = ["torch.distributed.fsdp", "transformers.trainer", "peft", "transformers.models.llama.modeling_llama"]


@functools.cache
def fork_server():
    """A context of `multiprocessing` as `"spawn"` is one, without the time that imports take."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    return context


def _work(target, arguments, environment, output):
    os.environ.clear()
    os.environ.update(environment)
    for number in (1, 2):
        os.dup2(os.open(f"{output}.{number}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    torch.set_num_threads(1)
    sys.argv = [target, *arguments]
    if target.endswith(".py"):
        sys.path.insert(0, str(Path(target).parent))
        runpy.run_path(target, run_name="__main__")
    else:
        runpy.run_module(target, run_name="__main__", alter_sys=True)


def start(target, *arguments, output, environment=None):
    """
    Begin what `python TARGET ARGUMENTS` does, or `python -m` for the name of a module.

    Args:
        output: path that ends in `.1` and `.2` get what is printed.
        environment: instead of this process's.
    """
    environment = {**(os.environ if environment is None else environment), "OMP_NUM_THREADS": "1"}
    given = (str(target), [*map(str, arguments)], environment, str(output))
    process = fork_server().Process(target=_work, args=given)
    process.start()
    return process


def run(target, *arguments, output, environment=None, timeout=300):
    """As `subprocess.run` with `capture_output` and `text`."""
    process = start(target, *arguments, output=output, environment=environment)
    process.join(timeout)
    if process.is_alive():
        process.kill()
        process.join()
    printed = (Path(f"{output}.{number}").read_text() for number in (1, 2))
    return subprocess.CompletedProcess([target, *arguments], process.exitcode, *printed)


def launch(target, folder, processes, *arguments, environment=None, timeout=600):
    """
    Run `target` in each of `processes` processes, which find one another as torchrun's do. If one fails, the others
    are stopped. What they print is in `FOLDER/log{rank}.1` and `.2`.

    Args:
        environment: beside this process's, without what accelerate finds there.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "FSDP_"))}
    environment = inherited | (environment or {})
    for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK"):
        environment.pop(name, None)
    running = []
    for rank in range(processes):
        mine = dict(environment)
        if processes > 1:
            mine |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
            mine |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        running.append(start(target, *arguments, output=folder / f"log{rank}", environment=mine))
    end = time.monotonic() + timeout
    while any(process.is_alive() for process in running):
        if any(process.exitcode for process in running) or time.monotonic() > end:
            for process in running:
                process.kill()
        time.sleep(0.05)
    for process in running:
        assert process.exitcode == 0, "".join(
            f"--- process {rank}\n{(folder / f'log{rank}.2').read_text()[-3000:]}\n" for rank in range(processes)
        )


def results_of(module, folder, processes, cases):
    """What each process of `python -m MODULE FOLDER CASES` wrote to `FOLDER/result{rank}.pt`."""
    launch(module, folder, processes, str(folder), json.dumps(cases))
    return [torch.load(folder / f"result{rank}.pt", weights_only=False) for rank in range(processes)]
