"""Load single files of published code without its requirements, which a comparison does not use."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch


class Missing(Exception):
    """A file or package that a comparison needs is not there."""


@dataclass
class Row:
    """
    One comparison.

    Attributes:
        method (`str`): What of peft_ext is compared.
        published (`str`): Repository and function it is compared with.
        compared (`str`): The quantity, and on what.
        result (`str`): How near the two are.
    """

    method: str
    published: str
    compared: str
    result: str


class Stub(types.ModuleType):
    """Stands for a package that the published file imports and the comparison does not use."""

    run = None  # of wandb: no run is active

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def published(code: Path, repository: str, file: str, stubs: tuple[str, ...] = (), **modules: Any) -> Any:
    """
    The module in a file of a repository.

    Args:
        code (`Path`): Folder with the repositories.
        repository (`str`): Name of the repository's folder.
        file (`str`): Path inside the repository.
        stubs (`tuple[str, ...]`): Packages to replace by empty ones where they are not installed.
        **modules: Modules to take the place of packages.
    """
    folder = code / repository
    if not (folder / file).is_file():
        raise Missing(f"{repository}/{file} is not in {code}")
    before, path = dict(sys.modules), list(sys.path)
    sys.path[:0] = [str(folder), str((folder / file).parent)]
    for name in stubs:
        if importlib.util.find_spec(name) is None:
            sys.modules[name] = Stub(name)
    sys.modules.update(modules)
    own = {"methods", "utils"} - before.keys()  # what these repositories call their folders
    try:
        spec = importlib.util.spec_from_file_location(f"published_{repository}_{Path(file).stem}", folder / file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path[:] = path
        for name in list(sys.modules):
            if name not in before and (name.partition(".")[0] in own or name in stubs or name in modules):
                del sys.modules[name]


@contextlib.contextmanager
def as_on_a_gpu_of_its_time() -> Iterator[None]:
    """Inside, `.cuda()` stays on the CPU, `np.bool` exists, and nothing is printed."""
    cuda, had = torch.Tensor.cuda, hasattr(np, "bool")
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign,assignment]
    if not had:
        np.bool = bool  # type: ignore[attr-defined]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        torch.Tensor.cuda = cuda  # type: ignore[method-assign]
        if not had:
            del np.bool


def relative(actual: Any, expected: Any) -> float:
    """Largest difference, relative to the largest magnitude expected."""
    actual, expected = torch.as_tensor(actual).double(), torch.as_tensor(expected).double()
    return float((actual - expected).abs().max() / expected.abs().max())
