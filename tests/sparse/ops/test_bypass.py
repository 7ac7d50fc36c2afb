"""The bypass: chunks of tokens leave no trace, sums are taken in fp32, everything is rounded once."""

import pytest
import torch

from peft_ext.sparse.ops import bags, bypass

from .._asserts import assert_product_correct
from .._inputs import DTYPES, SHAPES, Shape, make_inputs
from ._paths import PATHS
from .gpu._cases import DTYPES as CASE_DTYPES
from .gpu._cases import LAYOUTS, Case, assert_case_correct
from .gpu._cases import SHAPES as CASES


CHUNKED = {"k1": 1, "k3": 3, "ragged": (0, 3, 1, 9, 0, 2)}


@pytest.fixture(params=[1, 4])
def small_chunks(request, monkeypatch):
    """Chunks of 1 or 4 tokens: then 9 tokens are several chunks, the last one not full."""
    for constant in ("GATHER_TOKENS", "BAG_TOKENS"):
        monkeypatch.setattr(bags, constant, request.param)


@pytest.mark.parametrize("tokens", [3, 4, 5, 9, 20])
@pytest.mark.parametrize("entries", CHUNKED.values(), ids=CHUNKED)
@pytest.mark.parametrize(("dtype", "values_dtype"), DTYPES[::2], ids=str)
@pytest.mark.usefixtures("small_chunks")
def test_chunks_of_tokens_give_the_whole(dtype, values_dtype, entries, tokens):
    inputs = make_inputs(Shape((tokens,), 9, 6, entries), dtype, values_dtype)
    assert_product_correct(PATHS["bypass"], inputs)


@pytest.mark.parametrize("few_tokens", [0, 100])
@pytest.mark.parametrize("shape", ["k2", "k2 nine tokens", "k2 one token", "ragged", "k=fan_in"])
def test_products_for_few_and_for_many_tokens_agree(monkeypatch, shape, few_tokens):
    monkeypatch.setattr(bags, "FEW_TOKENS", few_tokens)
    assert_product_correct(PATHS["bypass"], make_inputs(SHAPES[shape]))


# Sums so long that they would be off by many units in the last place, were they taken in 16 bits.
LONG = {
    "300 inputs": Shape((3,), 300, 4, 300),
    "300 inputs, many tokens": Shape((40,), 300, 4, 300),
    "300 inputs, ragged": Shape((40,), 300, 4, (300, 7, 0, 1)),
    "300 neurons": Shape((6,), 70, 300, 4),
    "300 neurons, ragged": Shape((6,), 70, 300, (70, 0, 2) * 100),
    "6000 tokens, k1": Shape((6000,), 5, 3, 1),
    "6000 tokens": Shape((6000,), 5, 3, (3, 0, 1)),
}


@pytest.mark.parametrize("dtypes", CASE_DTYPES, ids=lambda dtypes: " ".join(str(dtype)[6:] for dtype in dtypes))
@pytest.mark.parametrize("shape", [*CASES, *LONG])
def test_output_and_gradients_are_fp32_sums_rounded_once(shape, dtypes):
    """Also under autocast, where x is fp32 and the base layer's result is not."""
    for layout in ("contiguous", *LAYOUTS):
        case = Case.draw((CASES | LONG)[shape], dtypes, layout)
        assert_case_correct(case, bypass(case.result, case.x, case.values, *case.support_tensors()))


@pytest.mark.parametrize("entries", [0, 1, 3, (0, 3, 1, 0, 0, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_zero_values_change_no_bit_of_the_result(dtype, entries):
    inputs = make_inputs(Shape((11,), 9, 6, entries), dtype)
    result = inputs.grad * 1000
    zeros = torch.zeros_like(inputs.values)
    support = inputs.support
    tables = (support.indices, support.offsets, *support.transposed())
    assert torch.equal(bypass(result, inputs.x.detach(), zeros, *tables), result)
