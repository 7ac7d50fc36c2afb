"""Two processes that train at once over one base weight in shared memory; run by `tests._processes.results_of`."""

import json
import sys
from pathlib import Path

import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

from tests.sparse._inputs import adapt


WIDTH, RUNS = 128, 20  # with k=1 "auto" folds where it may


class Together:
    """Replaces the dense product: both processes are in theirs at the same time, and the first leaves before the
    second does. What is folded into a shared weight is then seen by the other, and the originals get lost."""

    def __init__(self, context):
        self.inside, self.first_left = context.Barrier(2), context.Semaphore(0)

    def product(self, linear, is_first, check):
        def wrapped(*args):
            self.inside.wait(60)
            check()
            result = linear(*args)
            self.inside.wait(60)
            if not is_first:
                assert self.first_left.acquire(timeout=60)
            return result

        return wrapped


def train(weight, original, backend, together, is_first):
    """Steps of an optimiser on an adapter over `weight`: how often it was torn, and the reasons to refuse."""
    base = nn.Linear(WIDTH, WIDTH, bias=False)
    base.weight = nn.Parameter(weight, requires_grad=False)
    layer = adapt(base, k=1, backend=backend)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    x = torch.randn(8, WIDTH)
    torn, refusals, linear = [], [], F.linear
    for _ in range(RUNS):
        F.linear = together.product(linear, is_first, lambda: torn.append(not torch.equal(weight, original)))
        try:
            output = layer(x)
        except ValueError as error:
            refusals.append(str(error))
            continue
        finally:
            F.linear = linear
        if is_first:
            together.first_left.release()
        output.square().mean().backward()
        optimizer.step()
    return {"torn": sum(torn), "reads": len(torn), "refusals": refusals}


def second(results, *arguments):
    torch.set_num_threads(1)
    results.put(train(*arguments, is_first=False))


def pair(method, backend):
    """What two processes, made by fork or forkserver, saw, and how many weights are changed afterwards."""
    context = mp.get_context(method)
    weight = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1))
    original = weight.clone()
    weight.share_memory_()
    together, results = Together(context), context.Queue()
    process = context.Process(target=second, args=(results, weight, original, backend, together))
    process.start()
    found = [train(weight, original, backend, together, is_first=True), results.get(timeout=60)]
    process.join()
    return {"changed": int((weight != original).sum()), "processes": found}


def main(folder, cases):
    torch.set_num_threads(1)
    torch.save([pair(*case) for case in cases], Path(folder) / "result0.pt")


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
