"""Forward-mode derivatives: of the reference path they are right, of the others they are refused and never zero."""

import pytest
import torch
from torch.autograd import forward_ad

from peft_ext.sparse.ops import BACKENDS
from tests._models.layers import KINDS

from .._inputs import adapt


EVERY_KIND = pytest.mark.parametrize("kind", ["Linear", "1d"])
EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS)


def _layer(kind, backend):
    x = KINDS[kind].draw().detach()
    return adapt(KINDS[kind].build(), backend=backend), x, torch.randn_like(x)


def _with_dual_values(layer, x):
    values = layer.deltas["default"].weight
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(values.detach(), torch.ones_like(values))
        return torch.func.functional_call(layer, {"neuroada_delta.default.weight": dual}, (x,))


@EVERY_BACKEND
@EVERY_KIND
@pytest.mark.parametrize("grad_enabled", [True, False])
def test_derivatives_are_refused_or_right(kind, backend, grad_enabled):
    layer, x, direction = _layer(kind, backend)
    with torch.set_grad_enabled(grad_enabled):
        if backend != "reference":
            with pytest.raises(NotImplementedError, match="forward-mode.*backend='reference'"):
                torch.func.jvp(layer, (x,), (direction,))
            with pytest.raises(NotImplementedError, match="forward-mode"), forward_ad.dual_level():
                layer(forward_ad.make_dual(x, direction))
            with pytest.raises(NotImplementedError, match="forward-mode"):
                _with_dual_values(layer, x)
            return
        output, tangent = torch.func.jvp(layer, (x,), (direction,))
    with torch.no_grad():
        torch.testing.assert_close(output, layer(x))
        torch.testing.assert_close(tangent, layer(x + direction) - output)  # the layer is affine


@EVERY_BACKEND
@EVERY_KIND
def test_what_has_no_tangent_passes(kind, backend):
    layer, x, direction = _layer(kind, backend)
    expected = layer(x)
    with forward_ad.dual_level():
        forward_ad.make_dual(direction, x)
        torch.testing.assert_close(layer(x), expected)
    layer.enable_adapters(False)
    _, tangent = torch.func.jvp(layer, (x,), (direction,))
    torch.testing.assert_close(tangent, layer(x + direction) - layer(x))
