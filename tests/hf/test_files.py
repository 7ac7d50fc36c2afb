"""Saving is atomic: whatever interrupts it, the old files are whole and nothing else is left behind."""

import os
from types import FunctionType

import peft.peft_model
import pytest
import safetensors.torch
import torch
import transformers.modeling_utils
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open

import peft_ext.hf.files
import peft_ext.install.loading
import peft_ext.install.saving
import peft_ext.io
from peft_ext import NeuroAdaConfig
from tests.contract._common import assert_equal_bits, fill
from tests.tuners.neuroada._common import adapted, logits


WEIGHTS, CONFIG, README = "adapter_model.safetensors", "adapter_config.json", "README.md"


class Interrupted(BaseException):
    """Not an `Exception`, as `KeyboardInterrupt` is not: what ends a run is seldom one."""


def _write_half_of_the_weights(monkeypatch):
    serialize = safetensors.torch.serialize_file

    def write_half(tensors, filename, *args, **kwargs):
        serialize(tensors, filename, *args, **kwargs)
        os.truncate(filename, os.path.getsize(filename) // 2)
        raise Interrupted

    monkeypatch.setattr(safetensors.torch, "serialize_file", write_half)


def _write_half_of_a_text(monkeypatch, part):
    """Interrupt the writing of a text that contains `part`."""
    whole = peft_ext.io._write_text

    def write_half(path, text):
        if part not in text:
            return whole(path, text)
        whole(path, text[: len(text) // 2])
        raise Interrupted

    monkeypatch.setattr(peft_ext.io, "_write_text", write_half)


def _content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _through_peft(base, folder, seed, **kwargs):
    adapted(base, k=seed, seed=seed, task_type="CAUSAL_LM").save_pretrained(folder, **kwargs)


def _through_transformers(base, folder, seed):
    base.add_adapter(NeuroAdaConfig(k=seed))
    fill(base, seed=seed).save_pretrained(folder)


SAVERS = pytest.mark.parametrize("save", [_through_peft, _through_transformers])


@SAVERS
@pytest.mark.parametrize("first", [True, False], ids=["new folder", "old files"])
def test_interrupted_weights(tiny, tmp_path, monkeypatch, save, first):
    if not first:
        save(tiny("llama"), tmp_path, seed=1)
    before = _content(tmp_path)
    _write_half_of_the_weights(monkeypatch)
    with pytest.raises(Interrupted):
        save(tiny("llama"), tmp_path, seed=2)
    after = _content(tmp_path)
    assert after.get(WEIGHTS) == before.get(WEIGHTS)
    assert not [name for name in after if name.startswith(".")]  # no half of a file under a temporary name
    if not first:
        assert after.keys() == before.keys()


@SAVERS
def test_interrupted_config(tiny, tmp_path, monkeypatch, save):
    save(tiny("llama"), tmp_path, seed=1)
    before = _content(tmp_path)
    _write_half_of_a_text(monkeypatch, '"peft_type": "NEUROADA"')
    with pytest.raises(Interrupted):
        save(tiny("llama"), tmp_path, seed=2)
    after = _content(tmp_path)
    assert after[CONFIG] == before[CONFIG]
    assert after.keys() == before.keys()


def test_interrupted_card(llama, tmp_path, monkeypatch):
    model = adapted(llama)
    _write_half_of_a_text(monkeypatch, "## Use")
    with pytest.raises(Interrupted):
        model.save_pretrained(tmp_path)
    assert (tmp_path / README).read_text().startswith("---")
    assert "import peft_ext" not in (tmp_path / README).read_text()
    assert {path.name for path in tmp_path.iterdir()} == {README, WEIGHTS, CONFIG}


def test_full_disk_leaves_the_old_adapter_loadable(tiny, ids, tmp_path, monkeypatch):
    model = adapted(tiny("llama"), k=2)
    model.save_pretrained(tmp_path)
    expected = logits(model, ids)

    def refuse(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="No space left"):
        fill(model, seed=9).save_pretrained(tmp_path)
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert torch.equal(logits(PeftModel.from_pretrained(tiny("llama"), tmp_path), ids), expected)


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
@SAVERS
def test_permissions_are_those_of_any_new_file(llama, tmp_path, save, mask):
    before = os.umask(mask)
    try:
        save(llama, tmp_path / "adapter", seed=1)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "adapter").iterdir()}
    assert set(modes.values()) == {0o666 & ~mask}, modes


@SAVERS
def test_nothing_but_the_adapter_is_written(llama, tmp_path, save):
    save(llama, tmp_path, seed=1)
    names = {path.name for path in tmp_path.iterdir()}
    assert {WEIGHTS, CONFIG} <= names <= {WEIGHTS, CONFIG, README, "generation_config.json"}


def _tensors(folder):
    """Metadata and tensors of a file; safetensors writes the former in any order."""
    with safe_open(folder / WEIGHTS, "pt") as file:
        return file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def test_same_adapter_gives_the_same_files_through_peft_and_transformers(tiny, tmp_path):
    """Each is read by the other's users: one format, one checksum."""
    folders = [tmp_path / name for name in ("peft", "peft again", "transformers", "transformers again")]
    for folder, save in zip(folders, [_through_peft, _through_peft, *[_through_transformers] * 2], strict=True):
        save(tiny("llama"), folder, seed=1)
    metadata, tensors = _tensors(folders[0])
    assert metadata.keys() == {"format", peft_ext.hf.files.CHECKSUM_KEY}
    for folder in folders[1:]:
        other_metadata, other_tensors = _tensors(folder)
        assert other_metadata == metadata
        assert_equal_bits(other_tensors, tensors)
    configs = [(folder / CONFIG).read_bytes() for folder in folders]
    assert configs[0] == configs[1] and configs[2] == configs[3]


def test_checksum_covers_names_types_shapes_and_content():
    tensors = {"a.fingerprint": torch.arange(6), "b": torch.ones(2, 3)}
    changed = [
        {"a.fingerprint": torch.arange(6), "c": torch.ones(2, 3)},
        {"a.fingerprint": torch.arange(6), "b": torch.ones(3, 2)},
        {"a.fingerprint": torch.arange(6), "b": torch.ones(2, 3).view(torch.int32)},
        {"a.fingerprint": torch.arange(6), "b": torch.ones(2, 3) + torch.eye(2, 3) * 1e-7},
        {"a.fingerprint": torch.arange(6)},
    ]
    sums = [peft_ext.hf.files._checksum(content) for content in [tensors, *changed]]
    assert len(set(sums)) == len(sums)
    assert peft_ext.hf.files._checksum(dict(reversed(tensors.items()))) == sums[0]


def test_safetensors_own_function_is_what_peft_and_transformers_write_with(llama, tmp_path, monkeypatch):
    for module in (peft.peft_model, transformers.modeling_utils):
        assert module.safe_save_file is safetensors.torch.save_file
    seen = []

    def spy(tensors, filename, metadata=None):
        seen.append((os.path.basename(filename), metadata))
        safetensors.torch.save_file(tensors, filename, metadata=metadata)

    monkeypatch.setattr(peft.peft_model, "safe_save_file", spy)
    get_peft_model(llama, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert seen == [(WEIGHTS, {"format": "pt"})]  # PEFT's own call, to the file itself, with nothing added


@pytest.mark.parametrize("load", [False, True], ids=["saved", "saved and loaded"])
def test_nothing_of_ours_runs_for_other_methods(tiny, tmp_path, monkeypatch, load):
    def refuse(*args, **kwargs):
        raise AssertionError("called for an adapter of another method")

    monkeypatch.setattr(peft_ext.install.saving, "_with_our_writer", refuse)
    for name in ("Snapshot", "_checked_by_transformers"):
        monkeypatch.setattr(peft_ext.install.loading, name, refuse)
    base = tiny("llama")
    base.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    base.save_pretrained(tmp_path / "transformers")
    get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "peft")
    if load:
        PeftModel.from_pretrained(tiny("llama"), tmp_path / "transformers").load_adapter(tmp_path / "peft", "second")
        tiny("llama").load_adapter(str(tmp_path / "peft"))
    with pytest.raises(AssertionError):  # the refusal works
        adapted(tiny("llama")).save_pretrained(tmp_path / "ours")


def test_adapter_of_another_method_beside_ours_is_not_ours(llama, tmp_path, monkeypatch):
    llama.add_adapter(NeuroAdaConfig(), "ours")
    llama.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]), "theirs")
    monkeypatch.setattr(peft_ext.hf.files, "replace", None)
    llama.set_adapter("theirs")
    llama.save_pretrained(tmp_path)
    assert _tensors(tmp_path)[0] == {"format": "pt"}


def test_library_that_writes_otherwise_is_noticed(llama, tmp_path):
    def save_pretrained(self, folder):
        return folder

    save_pretrained = FunctionType(save_pretrained.__code__, {})
    with pytest.warns(UserWarning, match="no checksum, and an interruption may leave half"):
        assert peft_ext.install.saving.whole_files(save_pretrained)(adapted(llama), "folder") == "folder"


def test_ordinary_models_are_saved_as_without_us(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(peft_ext.hf.files, "replace", None)
    llama.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size > 0


def test_relative_path(llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    adapted(llama).save_pretrained("adapter")
    assert (tmp_path / "adapter" / WEIGHTS).is_file()
