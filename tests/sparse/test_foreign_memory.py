"""Base weights in memory that is not this process's own: never written, and adapted all the same."""

import ctypes
import multiprocessing
import warnings

import numpy as np
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.multiprocessing.reductions import reduce_storage

from peft_ext import NeuroAdaConfig
from peft_ext.sparse import memory
from peft_ext.sparse.memory import READ_ONLY, SEEN_BY_OTHERS, Region, why_not_ours
from peft_ext.sparse.ops import choose_backend, choose_conv_backend
from tests._processes import results_of

from ._asserts import assert_same_bits, bits
from ._inputs import adapt


ROWS, FAN_IN = 24, 96  # with k=1 "auto" folds where it may
SIZE = ROWS * FAN_IN


def _numbers():
    return torch.randn(ROWS, FAN_IN, generator=torch.Generator().manual_seed(0))


def _mapped(folder, mode):
    path = folder / "weight"
    path.write_bytes(_numbers().numpy().tobytes())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, that the array can't be written
        return torch.from_numpy(np.memmap(path, dtype=np.float32, mode=mode, shape=(ROWS, FAN_IN)))


def _from_file(folder):
    _mapped(folder, "r")
    return torch.from_file(str(folder / "weight"), shared=True, size=SIZE).view(ROWS, FAN_IN)


def _raw_array(folder):
    array = multiprocessing.RawArray(ctypes.c_float, SIZE)
    return torch.frombuffer(array, dtype=torch.float32).view(ROWS, FAN_IN).copy_(_numbers())


def _safetensors(folder):
    save_file({"weight": _numbers()}, folder / "weight.safetensors")
    return load_file(folder / "weight.safetensors")["weight"]


def _torch_load(folder):
    torch.save({"weight": _numbers()}, folder / "weight.pt")
    return torch.load(folder / "weight.pt", mmap=True)["weight"]


FOREIGN = {
    "share_memory": (lambda folder: _numbers().share_memory_(), SEEN_BY_OTHERS),
    "a part of a shared tensor": (lambda folder: torch.cat([_numbers()] * 2).share_memory_()[ROWS:], SEEN_BY_OTHERS),
    "multiprocessing's array": (_raw_array, SEEN_BY_OTHERS),
    "file mapped as shared": (_from_file, SEEN_BY_OTHERS),
    "memmap r+": (lambda folder: _mapped(folder, "r+"), SEEN_BY_OTHERS),
    "memmap r": (lambda folder: _mapped(folder, "r"), READ_ONLY),
}
OWN = {
    "ordinary": lambda folder: _numbers(),
    "memmap c": lambda folder: _mapped(folder, "c"),
    "safetensors": _safetensors,
    "torch.load": _torch_load,
}


def _layer(weight, conv=False):
    base = nn.Conv1d(FAN_IN, ROWS, 1, bias=False) if conv else nn.Linear(FAN_IN, ROWS, bias=False)
    base.weight = nn.Parameter(weight.view(base.weight.shape), requires_grad=False)
    return base


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("conv", [False, True], ids=["linear", "conv"])
def test_auto_leaves_memory_of_others_alone_and_folded_says_why(kind, conv, tmp_path):
    make, reason = FOREIGN[kind]
    base = _layer(make(tmp_path), conv)
    assert why_not_ours(base.weight) == reason
    original = bits(base.weight)
    x = torch.randn(5, FAN_IN, 1) if conv else torch.randn(5, FAN_IN)
    results = []
    for backend in ("auto", "bypass", "dense", "reference"):
        if conv and backend == "dense":
            continue  # it folds
        layer = adapt(base, k=1, backend=backend)
        output = layer(x)
        output.square().sum().backward()
        results.append((output.detach(), layer.deltas["default"].weight.grad))
        assert_same_bits(base.weight, original)
    for result in results:
        torch.testing.assert_close(result, results[-1])
    for backend in ("folded", "dense") if conv else ("folded",):
        with pytest.raises(ValueError, match=r"backend='folded'.*memory that (other processes|may not).*'bypass'"):
            adapt(base, k=1, backend=backend)(x)
    assert_same_bits(base.weight, original)


@pytest.mark.parametrize("kind", OWN)
def test_a_private_weight_is_folded_into(kind, tmp_path):
    weight = OWN[kind](tmp_path)
    assert why_not_ours(weight) is None
    assert choose_backend("auto", torch.zeros(5, FAN_IN), weight, ROWS, ROWS) == "folded"
    assert choose_conv_backend("auto", torch.zeros(5, FAN_IN, 1), weight[..., None], ROWS) == "folded"


def test_a_weight_that_is_shared_later_is_no_longer_folded_into():
    base = _layer(_numbers())
    layer = adapt(base, k=1, backend="folded")
    x = torch.randn(5, FAN_IN)
    expected = layer(x)
    layer.share_memory()
    with pytest.raises(ValueError, match="other processes"):
        layer(x)
    layer.backends["default"] = "auto"
    torch.testing.assert_close(layer(x), expected)


def test_what_another_storage_at_the_same_place_was_is_no_answer(monkeypatch):
    """Verdicts are remembered by storage: one that was moved, or is gone, says nothing about its successor."""
    weight = _numbers()
    assert why_not_ours(weight) is None
    monkeypatch.setattr(memory.Maps, "reason", lambda self, start, end: READ_ONLY)
    assert why_not_ours(weight) is None  # remembered
    assert why_not_ours(weight.clone()) == READ_ONLY
    moved = _numbers()
    with torch.no_grad():
        moved.set_(weight.untyped_storage().clone())
    assert why_not_ours(moved) == READ_ONLY


@pytest.mark.parametrize("names", [["one"], ["one", "two"]], ids=str)
@pytest.mark.parametrize("kind", FOREIGN)
def test_merging_into_memory_of_others_writes_a_copy(kind, names, tmp_path):
    """Also where two layers of the model share it."""
    foreign = FOREIGN[kind][0](tmp_path)
    base = nn.ModuleDict({name: _layer(foreign) for name in names})
    weights, original = {name: layer.weight for name, layer in base.items()}, bits(foreign)
    model = get_peft_model(base, NeuroAdaConfig(k=1, target_modules=names, init_weights=False))
    x = torch.randn(5, FAN_IN)
    expected = base["one"](x).detach()
    model.merge_adapter()
    for layer in base.values():
        torch.testing.assert_close(layer(x), expected)
    model.unmerge_adapter()
    assert all(layer.weight is weights[name] for name, layer in base.items())
    merged = model.merge_and_unload()["one"]
    torch.testing.assert_close(merged(x), expected)
    assert_same_bits(foreign, original)


def test_storages_that_went_to_another_process_are_known():
    """By which weights on a GPU are judged. Sending a CPU's tensor does the same book-keeping."""
    sent, kept = _numbers(), _numbers()
    reduce_storage(sent.untyped_storage())
    assert memory._was_exchanged(sent.untyped_storage()) and not memory._was_exchanged(kept.untyped_storage())


def test_regions_overlap_where_bytes_are_common():
    whole = torch.randn(8, 6)
    region = Region.of
    assert region(whole[:4]) != region(whole[:4].t()) and region(whole[:4]) == region(nn.Parameter(whole[:4]))
    assert region(whole[:4]).overlaps(region(whole[3:])) and not region(whole[:4]).overlaps(region(whole[4:]))
    assert not region(whole).overlaps(region(whole.clone()))
    meta = torch.empty(3, device="meta")
    assert region(meta) == region(meta) and not region(meta).overlaps(region(torch.empty(3, device="meta")))


BACKENDS = ("auto", "bypass", "dense", "reference", "folded")


@pytest.mark.slow
def test_two_processes_over_one_base_change_no_frozen_weight(tmp_path):
    cases = [*(("fork", backend) for backend in BACKENDS), ("forkserver", "auto")]
    (results,) = results_of("tests.sparse._shared_base", tmp_path, 1, cases)
    for (_, backend), result in zip(cases, results, strict=True):
        assert result["changed"] == 0
        for process in result["processes"]:
            assert process["torn"] == 0
            assert process["reads"] == (0 if backend == "folded" else 20)
            assert len(process["refusals"]) == (20 if backend == "folded" else 0)
