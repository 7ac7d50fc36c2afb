"""The module that carries one adapter's values and support: what it stores, and how it takes another support."""

import copy

import pytest
import torch
from torch import nn

from peft_ext.sparse.delta import SparseDelta
from peft_ext.sparse.fingerprint import FINGERPRINT_LENGTH
from peft_ext.sparse.support import Support

from ._inputs import random_support


FAN_IN = 9
FORMS = {"k1": 1, "k2": 2, "ragged": (0, 3, 1, 9, 0, 2)}


def _support(form="k2", seed=0):
    return random_support(6, FAN_IN, FORMS[form], torch.Generator().manual_seed(seed))


def _delta(form="k2", dtype=torch.float32, seed=0):
    return SparseDelta(_support(form, seed), dtype)


def _assert_same_tables(delta, support):
    for table, expected in zip(
        (delta.transposed_entries, delta.transposed_offsets), support.transposed(), strict=True
    ):
        assert torch.equal(table, expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_starts_at_zero_with_one_trained_parameter(form, dtype):
    delta = _delta(form, dtype)
    assert [name for name, _ in delta.named_parameters()] == ["weight"]
    assert delta.weight.requires_grad and delta.weight.dtype == dtype
    assert delta.weight.shape == _support(form).indices.shape
    assert not delta.weight.any()


@pytest.mark.parametrize(("form", "keys"), [("k2", {"weight", "indices", "fingerprint"}),
                                            ("ragged", {"weight", "indices", "offsets", "fingerprint"})])  # fmt: skip
def test_state_dict_holds_the_support_and_no_table_that_follows_from_it(form, keys):
    assert set(_delta(form).state_dict()) == keys


@pytest.mark.parametrize("form", FORMS)
def test_load_state_dict_takes_values_and_support_into_the_same_storages(form):
    """A compiled model holds on to them."""
    source, target = _delta(form, seed=1), _delta(form, seed=2)
    nn.init.normal_(source.weight)
    source.fingerprint.copy_(torch.arange(FINGERPRINT_LENGTH))
    names = (*source.names, "transposed_entries", "transposed_offsets")
    before = {name: getattr(target, name).data_ptr() for name in names}
    target.load_state_dict(source.state_dict())
    assert not target.stale
    for name in names:
        assert torch.equal(getattr(target, name), getattr(source, name)), name
        assert getattr(target, name).data_ptr() == before[name], name


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int64], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_indices_of_any_type_on_disk_are_int32_in_memory(form, dtype, assign):
    source, target = _delta(form, seed=1), _delta(form, seed=2)
    state = source.state_dict()
    state["indices"] = state["indices"].to(dtype)
    target.load_state_dict(state, assign=assign)
    if target.stale:  # a ragged support assigned in two steps waits for its first use
        target.refresh()
    assert target.indices.dtype == torch.int32
    assert torch.equal(target.indices, source.indices)
    _assert_same_tables(target, source.support)


@pytest.mark.parametrize("assign", [False, True])
def test_a_new_support_is_to_be_compared_with_the_base(assign):
    target = SparseDelta(_support(seed=2), torch.float32, pending=True)
    assert target.pending and target.checked
    target.load_state_dict(_delta(seed=1).state_dict(), assign=assign)
    assert not target.pending and not target.checked


def test_loading_values_alone_asks_for_no_new_comparison():
    target = _delta()
    target.load_state_dict({"weight": torch.ones(6, 2)}, strict=False)
    assert target.checked and target.weight.eq(1).all()


@pytest.mark.parametrize("bad", [[[0, 9]] * 6, [[1, 1]] * 6, [[-1, 1]] * 6], ids=["range", "repeated", "negative"])
def test_a_support_that_does_not_fit_is_refused(bad):
    bad = torch.tensor(bad, dtype=torch.int32)
    with pytest.raises(ValueError, match="indices"):
        SparseDelta(Support(bad, FAN_IN), torch.float32)
    with pytest.raises(ValueError, match="indices"):
        _delta().load_state_dict({**_delta().state_dict(), "indices": bad})
    with pytest.raises(ValueError, match="indices"):
        _delta().indices = bad


def test_another_shape_is_refused_by_load_state_dict():
    target = _delta("k2")
    before = target.indices.clone()
    with pytest.raises(RuntimeError, match="size mismatch"):
        target.load_state_dict(_delta("k1").state_dict())
    assert torch.equal(target.indices, before)


def test_refresh_follows_indices_that_changed_in_place():
    delta = _delta(seed=1)
    other = _delta(seed=2)
    assert not torch.equal(delta.transposed_entries, other.transposed_entries)
    delta.indices.copy_(other.indices)
    delta.refresh()
    _assert_same_tables(delta, other.support)


def _without_tables(delta):
    return delta._transposed_entries is None and delta._transposed_offsets is None


@pytest.mark.parametrize("form", FORMS)
def test_the_transposed_table_is_made_at_its_first_use(form):
    source, target = _delta(form, seed=1), _delta(form, seed=2)
    target.load_state_dict(source.state_dict())
    copied = copy.deepcopy(target)
    assert _without_tables(target) and _without_tables(copied)
    with torch.inference_mode():  # whose tensors training can't save
        target(torch.zeros(3, 6), torch.ones(3, FAN_IN))
    x = torch.ones(3, FAN_IN, requires_grad=True)
    target(torch.zeros(3, 6), x).sum().backward()
    for delta in (target, copied):
        _assert_same_tables(delta, source.support)


def test_tables_that_a_compiler_needs_are_made_for_all():
    """Code compiled for one adapter fits the others, a copy too: neither is compiled again."""
    first = _delta(seed=1)
    second = copy.deepcopy(first)
    second.indices.copy_(_delta(seed=2).indices)
    torch.compiler.reset()
    x = torch.randn(30, FAN_IN, requires_grad=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for delta in (first, second):
            nn.init.normal_(delta.weight)
            delta.compile(fullgraph=True, backend="aot_eager")
            delta(torch.zeros(30, 6), x).square().sum().backward()
    found, x.grad = x.grad, None
    for delta in (first, second):
        SparseDelta.forward(delta, torch.zeros(30, 6), x).square().sum().backward()
        _assert_same_tables(delta, delta.support)
    torch.testing.assert_close(found, x.grad)


def test_entries_that_were_compared_before_they_are_loaded_are_not_compared_again():
    state, target = _delta(seed=1).state_dict(), _delta(seed=2)
    target.expect(state)
    target.load_state_dict(state)
    assert target.checked and torch.equal(target.indices, state["indices"])


@pytest.mark.parametrize("name", ["indices", "fingerprint", "nothing"])
def test_entries_that_others_took_the_place_of_are_compared(name):
    state, target = _delta(seed=1).state_dict(), _delta(seed=2)
    target.expect(state)
    if name == "nothing":  # loaded before
        target.load_state_dict(state)
    target.load_state_dict(
        {key: tensor.clone() if key in (name, "weight") else tensor for key, tensor in state.items()}
    )
    assert not target.checked


CONVERSIONS = {
    "half": nn.Module.half,
    "double": nn.Module.double,
    "to": lambda delta: delta.to(torch.bfloat16),
    "type": lambda delta: delta.type(torch.float16),  # which casts integers too
}


@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS)
@pytest.mark.parametrize("form", FORMS)
def test_conversions_change_the_values_only(form, convert):
    delta = _delta(form)
    before = {name: tensor.clone() for name, tensor in delta.identity.items()}
    convert(delta)
    assert delta.weight.dtype != torch.float32
    for name, tensor in delta.identity.items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])


def test_on_the_meta_device_it_has_shapes_only_and_comes_alive_when_loaded():
    support = _support()
    delta = SparseDelta(support.to("meta"), torch.float32, pending=True)
    assert delta.weight.is_meta and delta.indices.is_meta
    source = _delta(seed=1)
    delta.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(delta.indices, source.indices)
    _assert_same_tables(delta, source.support)


@pytest.mark.parametrize(("form", "shape"), [("k2", "6x2"), ("ragged", "15")])
def test_repr_tells_sizes_and_whether_it_is_pending(form, shape):
    delta = SparseDelta(_support(form), torch.float32, pending=True)
    assert repr(delta) == f"SparseDelta(values={shape}, fan_in=9, pending)"
    assert "pending" not in repr(_delta(form))
