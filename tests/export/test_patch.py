"""Sparse patches in the coordinates of a checkpoint."""

import pytest
import torch
from safetensors.torch import load_file

from peft_ext import NeuroAdaConfig, cli
from peft_ext.export.merging import merge_checkpoint, revert_checkpoint
from peft_ext.export.patch import SparsePatch, apply_patch, read_patch, write_patch
from peft_ext.sparse import fingerprint
from tests.export._common import assert_same_files, saved_adapter, saved_base, tensors_of


@pytest.fixture(params=["llama", "gpt2"])
def folders(request, tmp_path):
    base = saved_base(tmp_path / "base", request.param, torch.bfloat16)
    adapter = saved_adapter(tmp_path / "adapter", base, request.param, NeuroAdaConfig(k=2))
    assert cli.main(["export", str(adapter), str(tmp_path / "patch"), "--to", "patch", "--base", str(base)]) == 0
    merge_checkpoint(base, adapter, tmp_path / "merged")
    return base, tmp_path / "patch" / "patch.safetensors", tmp_path / "merged"


def test_layout(folders):
    base, path, merged = folders
    before, after, content = tensors_of(base), tensors_of(merged), load_file(path)
    names = {key.removesuffix(".values") for key in content if key.endswith(".values")}
    assert names == {key for key in before if not torch.equal(before[key], after[key])}
    for name in names:
        indices, values = content[f"{name}.indices"], content[f"{name}.values"]
        assert indices.dtype == torch.int32 and values.dtype == before[name].dtype
        assert indices.dim() == 1 and indices.is_contiguous() and values.is_contiguous()
        assert bool((indices[1:] > indices[:-1]).all())
        patched = before[name].flatten().index_copy(0, indices.long(), values).view(before[name].shape)
        assert torch.equal(patched, after[name])


def test_applied_to_files_and_taken_out(folders, tmp_path):
    base, path, merged = folders
    merge_checkpoint(base, path, tmp_path / "patched")
    assert_same_files(tmp_path / "patched", merged)
    revert_checkpoint(tmp_path / "patched", path, tmp_path / "back")
    assert_same_files(tmp_path / "back", base)


def test_applied_to_tensors_and_taken_out(folders):
    base, path, merged = folders
    tensors, after = tensors_of(base), tensors_of(merged)
    undo = apply_patch(tensors, read_patch(path)[0])
    assert all(torch.equal(tensors[key], after[key]) for key in tensors)
    with pytest.raises(ValueError, match="is applied already"):
        apply_patch(tensors, read_patch(path)[0])
    apply_patch(tensors, undo)
    before = tensors_of(base)
    assert all(torch.equal(tensors[key], before[key]) for key in tensors)


def test_a_patch_that_fails_midway_leaves_nothing(folders):
    base, path, _ = folders
    tensors, before = tensors_of(base), tensors_of(base)
    patches, _ = read_patch(path)
    tensors[list(patches)[-1]] += 1
    with pytest.raises(ValueError, match="made for another model"):
        apply_patch(tensors, patches)
    assert all(torch.equal(tensors[key], before[key]) for key in list(patches)[:-1])


def test_what_does_not_fit_is_refused(tmp_path):
    weight = torch.arange(12.0).view(3, 4)
    patch = SparsePatch.between("w", weight, torch.tensor([7, 2]), torch.tensor([70.0, 20.0]))
    assert patch.indices.tolist() == [2, 7] and patch.values.tolist() == [20.0, 70.0]
    with pytest.raises(ValueError, match="not contiguous"):
        patch.apply(torch.arange(12.0).view(4, 3).t())
    with pytest.raises(ValueError, match="the patch is for"):
        patch.apply(weight.double())
    with pytest.raises(ValueError, match="no tensor 'w'"):
        apply_patch({}, {"w": patch})
    broken = SparsePatch("w", (3, 4), torch.tensor([7, 2], dtype=torch.int32), patch.values, patch.replaces)
    write_patch(tmp_path / "patch", [broken])
    with pytest.raises(ValueError, match="indices of 'w'"):
        read_patch(tmp_path / "patch")
    (tmp_path / "patch").write_bytes((tmp_path / "patch").read_bytes()[:-4])
    with pytest.raises(ValueError, match="not a whole patch"):
        read_patch(tmp_path / "patch")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8])
def test_checksum_in_parts_is_that_of_the_whole(dtype, monkeypatch):
    values = torch.randint(-100, 100, (5, 9), generator=torch.Generator().manual_seed(0)).to(dtype)
    bits = values.flatten().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[values.element_size()])
    expected = sum(number * (2 * place + 1) for place, number in enumerate(bits.tolist()))
    for at_once in (7, 45, 100):
        monkeypatch.setattr(fingerprint, "_SUMMED_AT_ONCE", at_once)
        assert fingerprint.checksum(values) == expected
