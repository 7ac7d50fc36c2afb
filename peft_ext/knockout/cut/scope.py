"""What the knockouts share: their hooks are on the model inside a context, for the calls of one thread."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from types import TracebackType
from typing import TypeVar

from ..model.position import PromptPosition


Scope = TypeVar("Scope", bound="KnockoutScope")


class KnockoutScope:
    """Base of the knockouts. `position` follows the calls to the model."""

    position: PromptPosition
    _stack: ExitStack | None = None

    def _put_hooks(self, stack: ExitStack) -> None:
        """Put hooks on the model, and what takes them off on the stack."""
        raise NotImplementedError

    def _forget(self) -> None:
        """Forget the calls to the model."""
        raise NotImplementedError

    def __enter__(self: Scope) -> Scope:
        if self._stack is not None:
            raise RuntimeError(f"This {type(self).__name__} is active already: make another one to nest it.")
        self.position.reset()
        self._forget()
        with ExitStack() as stack:
            self._put_hooks(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and not self.position.called:
            warnings.warn(
                f"{type(self).__name__} ended without a call to its layers: run the model inside, in the same thread, "
                "and not as compiled code, which passes over knockouts.",
                stacklevel=2,
            )
        self._forget()
        stack, self._stack = self._stack, None
        if stack is not None:
            stack.close()
