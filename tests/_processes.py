"""Runs a module's work in one or several processes over gloo: `python -m MODULE FOLDER CASES` in each."""

import json
import os
import socket
import subprocess
import sys
import time

import torch


def launch(module, folder, processes, cases, timeout=600):
    """
    Let `module` work through the cases in each of `processes` processes; returns what each wrote to
    `FOLDER/result{rank}.pt`. If one fails, the others are stopped.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "FSDP_"))}
    for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK"):
        environment.pop(name, None)
    environment["OMP_NUM_THREADS"] = "1"
    running, logs = [], []
    for rank in range(processes):
        mine = dict(environment)
        if processes > 1:
            mine |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
            mine |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        logs.append(open(folder / f"log{rank}.txt", "w+"))  # noqa: SIM115
        command = [sys.executable, "-m", module, str(folder), json.dumps(cases)]
        running.append(subprocess.Popen(command, env=mine, stdout=logs[rank], stderr=subprocess.STDOUT))
    end = time.monotonic() + timeout
    while any(process.poll() is None for process in running):
        if any(process.poll() for process in running) or time.monotonic() > end:
            for process in running:
                process.kill()
        time.sleep(0.1)
    for log in logs:
        log.close()
    for rank, process in enumerate(running):
        assert process.returncode == 0, "".join(
            f"--- process {rank}\n{(folder / f'log{rank}.txt').read_text()[-3000:]}\n" for rank in range(processes)
        )
    return [torch.load(folder / f"result{rank}.pt", weights_only=False) for rank in range(processes)]
