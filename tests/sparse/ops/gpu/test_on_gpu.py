"""The compiled kernels on a CUDA device, against the same dense matrices as in the interpreter."""

import pytest
import torch

from peft_ext.sparse.ops import add_in_place, bypass, may_add_in_place

from ..._inputs import Shape
from ..test_experts import make_case
from ._cases import DTYPES, LAYOUTS, SHAPES, Case, assert_case_correct


pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():  # not case by case, which takes as long as some hundred tests
    pytest.skip("its 2,116 cases need a CUDA device", allow_module_level=True)

# Every program's blocks are full somewhere and not elsewhere; the last has an input that all neurons read.
LARGE = {
    "k1": Shape((1000,), 4096, 700, 1),
    "k20": Shape((333,), 1000, 300, 20),
    "k512": Shape((70,), 600, 40, 512),
    "wide": Shape((50,), 14336, 300, 4),
    "one input": Shape((100,), 1, 5000, 1),
    "uneven": Shape((100,), 3000, 900, (0, 1, 33, 2, 0, 700) * 150),
}


@pytest.fixture(params=["tuned", "direct", "columns first", "staged"])
def family(request, monkeypatch):
    """Restrict what is measured to one family of kernels; "tuned" leaves the choice."""
    from peft_ext.sparse.ops.gpu import launch, tuning

    monkeypatch.setattr(tuning, "_chosen", {})
    for name in ("sum_configs", "value_configs") if request.param != "tuned" else ():
        every = getattr(launch, name)

        def some(*sizes, every=every):
            configs = every(*sizes)
            of_family = {
                "direct": [config for config in configs if not config.staged and not config.columns_first],
                "columns first": [config for config in configs if config.columns_first],
                "staged": [config for config in configs if config.staged],
            }
            return of_family[request.param] or configs

        monkeypatch.setattr(launch, name, some)


@pytest.mark.parametrize("layout", ["contiguous", *LAYOUTS])
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda dtypes: " ".join(str(dtype)[6:] for dtype in dtypes))
@pytest.mark.parametrize("shape", [*SHAPES, *LARGE])
@pytest.mark.usefixtures("family")
def test_output_and_gradients_are_fp32_sums_rounded_once(shape, dtypes, layout):
    case = Case.draw({**SHAPES, **LARGE}[shape], dtypes, layout, "cuda")
    assert_case_correct(case, bypass(case.result, case.x, case.values, *case.support_tensors()))


@pytest.mark.parametrize("shape", [*SHAPES, *LARGE])
@pytest.mark.usefixtures("family")
def test_in_place_is_the_same(shape):
    case = Case.draw({**SHAPES, **LARGE}[shape], DTYPES[1], "contiguous", "cuda")
    base = case.result * 1
    assert may_add_in_place(base, case.x, case.values)
    assert_case_correct(case, add_in_place(base, case.x, case.values, *case.support_tensors()))


@pytest.mark.usefixtures("family")
def test_equal_inputs_give_equal_bits():
    case = Case.draw(LARGE["k20"], DTYPES[1], "contiguous", "cuda")

    def results():
        out = bypass(case.result, case.x, case.values, *case.support_tensors())
        return out, *torch.autograd.grad(out, (case.result, case.x, case.values), case.grad)

    for first, again in zip(results(), results(), strict=True):
        assert torch.equal(first, again)


@pytest.mark.parametrize("entries", [1, 5, (0, 2, 1, 0, 4, 1) * 4], ids=["k1", "k5", "uneven"])
@pytest.mark.usefixtures("family")
def test_experts_are_right_and_give_equal_bits(entries):
    leaves, ours, dense = make_case(entries, "uneven", torch.float32, device="cuda")
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]

    def results(compute, leaves):
        out = compute(*leaves)
        return out, *torch.autograd.grad(out, leaves, torch.ones_like(out))

    expected = results(dense, wide)
    for first, again, exact in zip(results(ours, leaves), results(ours, leaves), expected, strict=True):
        assert torch.equal(first, again)
        torch.testing.assert_close(first.double(), exact, atol=1e-5, rtol=1e-5)
