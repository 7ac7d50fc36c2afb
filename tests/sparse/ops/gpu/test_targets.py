"""The kernels as machine code for A100 and H100, made without a GPU from the very launches at Llama-3-8B's shapes."""

import re

import pytest
import torch

from peft_ext.sparse.ops.gpu import launch

from ._targets import compiled, launches


# Registers of a thread and shared memory of a block; more than this the hardware does not have.
MAX_REGISTERS, MAX_SHARED_BYTES = 255, {80: 163 * 1024, 90: 227 * 1024}


def _work(product, config, k, width, rows, dtype, ragged, experts=None):
    """One product on meta tensors, with one of the configurations that are measured; of one layer or of experts."""
    tokens, neurons, inputs = 1024, rows, width
    if experts is not None:
        tokens, neurons, inputs = 8192, experts * rows, experts * width

    def empty(*shape, dtype=torch.int32):
        return torch.empty(shape, dtype=dtype, device="meta")

    indices, values = empty(neurons, k), empty(neurons, k, dtype=torch.float32)
    x, grad = empty(tokens, width, dtype=dtype), empty(tokens, rows, dtype=dtype)
    offsets = rows_of_entries = None
    if ragged:
        indices, values = indices.view(-1), values.view(-1)
        offsets, rows_of_entries = empty(neurons + 1), empty(neurons * k)
    ends = [] if experts is None else [empty(experts)]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("sum_configs", "value_configs") if experts is None else ("unstaged",):
            every = getattr(launch, name)
            patch.setattr(launch, name, lambda *sizes, every=every: [every(*sizes)[config]])
        if product == "add":
            launch.add(grad, x, values, indices, offsets, grad, *ends)
        elif product == "grad_input":
            transposed = empty(neurons * k), empty(inputs + 1)
            launch.grad_input(grad, values, indices, rows_of_entries, *transposed, x, *ends)
        else:
            launch.grad_values(grad, x, indices, rows_of_entries, *ends)


CASES = [
    ("add", 0, 1, 4096, 14336, torch.bfloat16, 80),
    ("add", 1, 20, 4096, 14336, torch.float32, 90),
    ("add", 2, 1, 4096, 14336, torch.bfloat16, 90),
    ("add", 3, 20, 4096, 4096, torch.bfloat16, 90),
    ("add", 2, 1, 14336, 4096, torch.float16, 90),
    ("add", 2, 20, 14336, 4096, torch.bfloat16, 90),
    ("grad_input", 0, 1, 4096, 14336, torch.bfloat16, 90),
    ("grad_input", 2, 1, 4096, 4096, torch.bfloat16, 90),
    ("grad_input", 3, 4, 4096, 4096, torch.bfloat16, 80),
    ("grad_input", 2, 1, 14336, 4096, torch.bfloat16, 80),
    ("grad_input", 3, 20, 14336, 4096, torch.float32, 90),
    ("grad_input", 2, 1, 4096, 14336, torch.bfloat16, 90),
    ("grad_input", 2, 20, 4096, 14336, torch.float16, 80),
    ("grad_input", 2, 4, 4096, 11008, torch.bfloat16, 90),
    ("add", -1, 20, 4096, 14336, torch.bfloat16, 90),
    ("add", -1, 4, 14336, 4096, torch.float32, 80),
    ("grad_input", -1, 20, 4096, 14336, torch.bfloat16, 90),
    ("grad_input", -1, 1, 4096, 14336, torch.float16, 80),
    ("grad_values", 0, 1, 4096, 14336, torch.bfloat16, 90),
    ("grad_values", 1, 20, 4096, 4096, torch.float32, 80),
    ("grad_values", 2, 1, 4096, 14336, torch.bfloat16, 90),
    ("grad_values", 3, 20, 4096, 14336, torch.bfloat16, 90),
    ("grad_values", 2, 1, 14336, 4096, torch.bfloat16, 90),
    ("grad_values", 2, 4, 4096, 4096, torch.float32, 90),
    ("grad_values", 3, 4, 4096, 14336, torch.bfloat16, 80),
    ("grad_values", 3, 4, 4096, 14336, torch.float32, 90),
    ("grad_values", 2, 4, 14336, 4096, torch.bfloat16, 80),
]
RAGGED = [
    ("add", 1, 20, 4096, 4096, torch.bfloat16, 80),
    ("add", 0, 20, 4096, 4096, torch.bfloat16, 90),
    ("add", 3, 20, 4096, 4096, torch.bfloat16, 90),
    ("add", 2, 20, 14336, 4096, torch.bfloat16, 90),
    ("grad_input", 0, 20, 4096, 4096, torch.bfloat16, 90),
    ("grad_input", 3, 20, 4096, 4096, torch.bfloat16, 90),
    ("grad_values", 0, 20, 4096, 4096, torch.bfloat16, 90),
    ("grad_values", 2, 20, 4096, 4096, torch.bfloat16, 90),
]


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Function: a capability and work on meta tensors to the machine code of its last launch."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def make(capability, work):
        *_, (kernel, args, options) = launches(work)
        code = compiled(kernel, args, options, capability)
        assert code.registers <= MAX_REGISTERS and code.shared_bytes <= MAX_SHARED_BYTES[capability]
        return code

    return make


LAUNCH = ("product", "config", "k", "width", "rows", "dtype", "capability", "ragged")


@pytest.mark.parametrize(
    LAUNCH,
    [*((*case, False) for case in CASES), *((*case, True) for case in RAGGED)],
    ids=str,
)
def test_a_launch_compiles_without_spilling(
    product, config, k, width, rows, dtype, capability, ragged, made, record_property
):
    code = made(capability, lambda: _work(product, config, k, width, rows, dtype, ragged))
    record_property("registers", code.registers)
    record_property("shared_bytes", code.shared_bytes)
    # Of the scan the compiler keeps up to four numbers in local memory to stay at 128 registers: two loads among some
    # 700 instructions of a round.
    few_bytes, few_loads = (16, 2) if code.name == "gather_sum_staged_uneven" else (0, 0)
    assert code.local_bytes <= few_bytes and code.local_in_loops <= few_loads
    # Activations are addressed in 64 bits: the pointers of their elements, not those of the small tables.
    element = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}[dtype]
    offsets = re.findall(rf"tt\.addptr .*!tt\.ptr<{element}>>?, (.*)$", code.ttir, re.MULTILINE)
    assert offsets
    if dtype != torch.float32:  # in fp32 the values have pointers of the same type
        assert all("i64" in offset for offset in offsets)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_copy_with_columns_first_compiles_without_spilling(dtype, made):
    code = made(90, lambda: launch.columns_first(torch.empty(1000, 4096, dtype=dtype, device="meta")))
    assert code.name == "transposed" and code.local_bytes == 0


@pytest.mark.parametrize(
    LAUNCH,
    [
        ("add", 0, 1, 2048, 1536, torch.bfloat16, 90, False),
        ("add", 1, 20, 2048, 1536, torch.float32, 80, False),
        ("add", -1, 20, 4096, 28672, torch.bfloat16, 90, True),
        ("grad_input", 0, 20, 768, 2048, torch.bfloat16, 80, False),
        ("grad_input", 1, 20, 2048, 1536, torch.bfloat16, 90, True),
        ("grad_input", -1, 20, 4096, 28672, torch.bfloat16, 90, False),
        ("grad_values", 0, 1, 2048, 1536, torch.bfloat16, 90, False),
        ("grad_values", 1, 20, 4096, 28672, torch.float32, 80, True),
    ],
    ids=str,
)
def test_a_launch_for_experts_compiles_without_spilling(
    product, config, k, width, rows, dtype, capability, ragged, made
):
    code = made(capability, lambda: _work(product, config, k, width, rows, dtype, ragged, experts=128))
    assert code.local_bytes <= 16 and code.local_in_loops == 0  # a number or two that are kept while a tile is found
