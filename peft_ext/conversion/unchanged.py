"""A model that some work on it leaves as it was, if that work fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """
    Around work that replaces modules and sets attributes of a model: on an error, put all of them back.

    Modules, parameters, hooks, modes and what requires gradients are kept track of, the content of tensors is not.
    """
    # Tables are put back into the same objects: a hook's handle, for one, knows its table and not its module.
    modules = [(vars(module), dict(vars(module))) for module in model.modules()]
    tables = [
        (table, table.copy()) for _, attributes in modules for table in attributes.values() if isinstance(table, dict)
    ]
    parameters = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for now, before in (*modules, *tables):
            now.clear()
            now.update(before)
        for parameter, trainable in parameters:
            parameter.requires_grad_(trainable)
        raise
