"""The bypass: chunks of tokens leave no trace, sums are taken in fp32, everything is rounded once."""

import pytest
import torch

from peft_ext.sparse.ops import bags
from peft_ext.sparse.ops import bypass as bypass_op
from peft_ext.sparse.ops.bypass import bypass, sparse_grad_input, sparse_grad_values

from .._asserts import assert_product_correct, dense_update, output_and_gradients, ulps_apart
from .._inputs import DTYPES, SHAPES, Shape, make_inputs, random_support
from ._paths import PATHS


CHUNKED = {"k1": 1, "k3": 3, "ragged": (0, 3, 1, 9, 0, 2)}


@pytest.fixture(params=[1, 4])
def small_chunks(request, monkeypatch):
    """Chunks of 1 or 4 tokens: then 9 tokens are several chunks, the last one not full."""
    for constant in ("GATHER_TOKENS", "BAG_TOKENS"):
        monkeypatch.setattr(bags, constant, request.param)


@pytest.mark.parametrize("tokens", [3, 4, 5, 9, 20])
@pytest.mark.parametrize("entries", CHUNKED.values(), ids=CHUNKED)
@pytest.mark.parametrize(("dtype", "values_dtype"), DTYPES, ids=str)
@pytest.mark.usefixtures("small_chunks")
def test_chunks_of_tokens_give_the_whole(dtype, values_dtype, entries, tokens):
    inputs = make_inputs(Shape((tokens,), 9, 6, entries), dtype, values_dtype)
    assert_product_correct(PATHS["bypass"], inputs)


@pytest.mark.parametrize("few_tokens", [0, 100])
@pytest.mark.parametrize("shape", ["k2", "k2 nine tokens", "k2 one token", "ragged", "k=fan_in"])
def test_products_for_few_and_for_many_tokens_agree(monkeypatch, shape, few_tokens):
    monkeypatch.setattr(bags, "FEW_TOKENS", few_tokens)
    assert_product_correct(PATHS["bypass"], make_inputs(SHAPES[shape]))


@pytest.mark.parametrize("tokens", [256, 257, 600])
def test_default_chunk_of_gathered_tokens(tokens):
    assert_product_correct(PATHS["bypass"], make_inputs(Shape((tokens,), 9, 6, 1)))


@pytest.mark.parametrize("tokens", [4096, 4097])
def test_default_chunk_of_bagged_tokens(tokens):
    assert_product_correct(PATHS["bypass"], make_inputs(Shape((tokens,), 5, 3, 2)))


@pytest.mark.parametrize("values_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("entries", [1, 300, (300, 7, 0, 1)], ids=str)
@pytest.mark.parametrize("tokens", [3, 40])
def test_output_is_rounded_once(dtype, values_dtype, entries, tokens):
    """300 terms summed in 16 bits would be off by many units in the last place."""
    generator = torch.Generator().manual_seed(0)
    support = random_support(4, 300, entries, generator)
    x = torch.rand(tokens, 300, generator=generator).to(dtype)  # positive: no cancellation
    values = torch.rand(support.indices.shape, generator=generator).to(values_dtype)
    result = torch.rand(tokens, 4, generator=generator).to(dtype)
    exact = result.double() + x.double() @ dense_update(values.double(), support).t()
    out = bypass(result, x, values, support.indices, support.offsets, *support.transposed())
    assert out.dtype == dtype
    assert ulps_apart(out, exact).max() <= 0.51
    if entries == 300:  # the bound would notice sums in the dtype of x
        narrow = result.clone()
        for column in range(300):
            narrow += x[:, column, None] * dense_update(values, support)[:, column].to(dtype)
        assert ulps_apart(narrow, exact).max() > 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("entries", [1, 3, (3, 0, 1)], ids=str)
def test_gradient_of_values_is_summed_in_fp32(dtype, entries):
    generator = torch.Generator().manual_seed(0)
    support = random_support(3, 5, entries, generator)
    x, grad = (torch.rand(6000, width, generator=generator).to(dtype) for width in (5, 3))
    result = sparse_grad_values(grad, x, support.indices, support.offsets)
    exact = support.gather(grad.double().t() @ x.double())
    assert result.dtype == torch.float32
    assert ((result - exact).abs() <= 1e-5 * exact).all()


@pytest.mark.parametrize("values_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("entries", [1, 3, (70, 0, 2) * 100], ids=["k1", "k3", "ragged"])
def test_gradient_of_x_is_rounded_once(entries, values_dtype):
    """300 neurons read each input, so that sums are long."""
    generator = torch.Generator().manual_seed(0)
    support = random_support(300, 70 if isinstance(entries, tuple) else 4, entries, generator)
    grad = torch.rand(6, 300, generator=generator).to(torch.bfloat16)
    values = torch.rand(support.indices.shape, generator=generator).to(values_dtype)
    out = sparse_grad_input(grad, values, support.indices, support.offsets, *support.transposed(), torch.bfloat16)
    exact = grad.double() @ dense_update(values.double(), support)
    assert out.dtype == torch.bfloat16
    assert ulps_apart(out, exact)[exact > 0].max() <= 0.51
    assert (out[exact == 0] == 0).all()


@pytest.mark.parametrize("entries", [1, 3, (0, 3, 1)], ids=str)
def test_narrow_result_takes_a_wide_x(entries):
    """As under autocast: x is fp32, the base layer's result bf16."""
    generator = torch.Generator().manual_seed(0)
    support = random_support(3, 5, entries, generator)
    x = torch.randn(7, 5, generator=generator).requires_grad_()
    values = torch.randn(support.indices.shape, generator=generator).requires_grad_()
    result = torch.randn(7, 3, generator=generator).to(torch.bfloat16).requires_grad_()
    y = bypass_op(result, x, values, support.indices, support.offsets, *support.transposed())
    grad = torch.randn(7, 3, generator=generator).to(torch.bfloat16)
    y.backward(grad)
    update = dense_update(values.detach().double(), support)
    torch.testing.assert_close(y, (result.double() + x.double() @ update.t()).to(torch.bfloat16))
    torch.testing.assert_close(x.grad, (grad.double() @ update).float())
    torch.testing.assert_close(values.grad, support.gather(grad.double().t() @ x.detach().double()).float())
    assert torch.equal(result.grad, grad)


@pytest.mark.parametrize("entries", [0, 1, 3, (0, 3, 1, 0, 0, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_zero_values_change_no_bit_of_the_result(dtype, entries):
    inputs = make_inputs(Shape((11,), 9, 6, entries), dtype)
    result = inputs.grad * 1000
    zeros = torch.zeros_like(inputs.values)
    support = inputs.support
    tables = (support.indices, support.offsets, *support.transposed())
    assert torch.equal(bypass(result, inputs.x.detach(), zeros, *tables), result)


def test_result_and_x_are_not_written_to():
    inputs = make_inputs(SHAPES["k2"])
    result = inputs.grad.clone()
    x = inputs.x.detach().clone()
    out = bypass_op(result, x, inputs.values, inputs.support.indices, None, *inputs.support.transposed())
    assert torch.equal(result, inputs.grad) and torch.equal(x, inputs.x)
    assert not torch.equal(out, result)


def test_columns_that_no_neuron_reads_get_no_gradient():
    inputs = make_inputs(Shape((11,), 9, 2, 1))
    gradient = output_and_gradients(lambda x, w, b, v, s: PATHS["bypass"](x, w * 0, b, v, s), inputs)["gradient of x"]
    read = set(inputs.support.indices.reshape(-1).tolist())
    for column in range(9):
        assert bool((gradient[:, column] == 0).all()) == (column not in read)
