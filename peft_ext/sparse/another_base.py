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
    Let adapters be loaded onto another base model, as long as its layers have the same shapes.

    Without it, an adapter loads onto the weights that it was made for: the same bits, a cast of them, or those that
    agree within the rounding if either base is quantised. Inside, every way of loading takes the base as it is:
    `PeftModel.from_pretrained`, `load_adapter` of PEFT and transformers, `hotswap_adapter`, state dicts. `peft-ext
    merge` has `--another-base`.

    The trained values are added to the weights that are there, so the sum is another one than in training, by the
    difference of the bases. Nothing of this is saved: the adapter still names the base that it was made for, and
    loading it here again takes the same `with`.

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
