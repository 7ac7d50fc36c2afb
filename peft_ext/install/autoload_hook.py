"""Import `peft_ext` right after `peft`, in every program of an environment.

`python -m peft_ext.autoload --enable` copies this file into site-packages as `_peft_ext_autoload.py`, beside a `.pth`
file that imports the copy when Python starts. So it stands alone: it imports nothing that costs time before `peft` is
wanted, and does nothing once `peft_ext` is uninstalled.
"""

from __future__ import annotations

import sys
from _thread import get_ident


TYPE_CHECKING = False  # `typing` itself would cost every start some milliseconds
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any


class _AfterPeft:
    """A meta-path finder that finds nothing itself: it lets the others find `peft` and adds a step to its execution.

    The step goes onto the instance of the loader rather than into a wrapper, so that `peft.__loader__` keeps its type
    and its resource and source methods. Programs ask for the spec without importing (`is_peft_available`), so finding
    `peft` changes nothing here; only executing it does.
    """

    def __init__(self) -> None:
        self._asking: set[int] = set()  # threads inside find_spec; other delegating finders may call back

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        thread = get_ident()
        if name != "peft" or thread in self._asking:
            return None
        self._asking.add(thread)
        try:
            for finder in list(sys.meta_path):
                find = getattr(finder, "find_spec", None)
                spec = find(name, path, target) if find is not None and finder is not self else None
                if spec is not None:
                    self._extend(spec.loader)
                    return spec
            return None
        finally:
            self._asking.discard(thread)

    def _extend(self, loader: Any) -> None:
        execute = getattr(loader, "exec_module", None)
        if execute is None:
            return

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if module.__name__ == "peft":  # a zip file's loader serves other modules too
                vars(loader).pop("exec_module", None)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                _import_peft_ext()

        try:
            loader.exec_module = exec_module
        except (AttributeError, TypeError):
            return  # a loader with slots: `peft` loads as ever, `peft_ext` has to be imported by hand


def _import_peft_ext() -> None:
    if "peft_ext" in sys.modules:
        return  # it is what imported peft, and registers its methods itself
    try:
        import peft_ext  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "peft_ext":  # uninstalled, and this file left behind: nothing to do
            _warn(error)
    except Exception as error:  # `import peft` must not fail because of us
        _warn(error)


def _warn(error: Exception) -> None:
    import warnings

    message = (
        "peft_ext could not be imported after peft, so PEFT does not know its methods: "
        f"{type(error).__name__}: {error}. `python -c 'import peft_ext'` shows the whole error; to switch the import "
        f"off, delete peft_ext_autoload.pth beside {__file__}"
    )
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    except RuntimeWarning:  # warnings are errors here
        print(message, file=sys.stderr)


def install() -> None:
    """Put the finder first on `sys.meta_path`."""
    sys.meta_path.insert(0, _AfterPeft())


if __name__ == "_peft_ext_autoload":
    install()
