"""Fine-grained sparse tuning as PEFT methods. Importing the package registers them with PEFT and transformers."""

import importlib
import sys
from pathlib import Path
from typing import Any

from ._version import __version__ as __version__


# The command `peft-ext` imports this file before its own. Torch and PEFT take seconds, which its help and its errors
# need not wait for; `cli.py` imports the rest before a job runs.
if Path((getattr(sys, "argv", None) or [""])[0]).stem != "peft-ext":
    from .api import *  # noqa: F403
    from .api import __all__ as __all__


def __getattr__(name: str) -> Any:
    if name in ("export", "factory", "knockout", "mtl"):  # import much, such as Trainer: when they are asked for
        return importlib.import_module(f".{name}", __name__)
    if not name.startswith("__") and hasattr(api := importlib.import_module(".api", __name__), name):
        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
