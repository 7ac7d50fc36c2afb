"""Load adapters onto another base model than the one they were made for, on purpose."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar


# How to say so, for errors.
REMEDY = (
    "use the base model it was trained on or, to add it to this one on purpose, load it inside `with "
    "peft_ext.another_base():`"
)
_accepted: ContextVar[bool] = ContextVar("peft_ext_another_base", default=False)


@contextmanager
def another_base() -> Iterator[None]:
    """
    Context manager that allows adapters to be loaded onto another base model whose layers have the same shapes.

    Outside it, an adapter loads only onto the weights that it was made for: the same bits, a cast of them, or weights
    that agree within the rounding of a quantised base. Inside it, every way of loading accepts the base as it is:
    `PeftModel.from_pretrained`, `load_adapter` of PEFT and transformers, `hotswap_adapter`, and state dicts. The
    command `peft-ext merge` has the option `--another-base`.

    The trained values are added to the weights of this base, so the sums differ from those in training by the
    difference of the two bases. Nothing of this is saved: the adapter still names the base that it was made for, and
    needs the same context when it is loaded again.

    Example:

        ```py
        >>> import peft_ext
        >>> from peft import PeftModel

        >>> with peft_ext.another_base():
        ...     model = PeftModel.from_pretrained(instruct_model, "adapter-of-the-pretrained-model")
        ```
    """
    token = _accepted.set(True)
    try:
        yield
    finally:
        _accepted.reset(token)


def accepts_another_base() -> bool:
    """Whether the caller is inside [`another_base`]."""
    return _accepted.get()
