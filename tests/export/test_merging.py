"""`peft-ext merge`: files merged without the model are those that the model would have saved, and come back."""

import json
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from peft_ext import GPSConfig, NeuroAdaConfig, cli
from peft_ext.export.merging import ORIGINALS_FILE, merge_checkpoint, revert_checkpoint
from tests._processes import run
from tests.contract._damage import drop, edit
from tests.export._common import (
    assert_same_files,
    assert_same_tensors,
    loaded_base,
    merged_in_memory,
    saved_adapter,
    saved_base,
    tensors_of,
)


CASES = {
    "bf16, shards": ("llama", torch.bfloat16, NeuroAdaConfig(k=2), {"max_shard_size": "20KB"}),
    "Conv1D, biases": ("gpt2", torch.float32, NeuroAdaConfig(k=2, train_bias=True), {}),
    "fp16, uneven rows, a head": (
        "bert",
        torch.float16,
        NeuroAdaConfig(k=2, selection="magnitude_network", modules_to_save=["classifier"], task_type="SEQ_CLS"),
        {},
    ),
    "tokens, biases of the base": (
        "llama",
        torch.bfloat16,
        NeuroAdaConfig(k=1, trainable_token_indices=[1, 5], values_dtype="bfloat16"),
        {},
    ),
    "other names in files": ("llava", torch.bfloat16, NeuroAdaConfig(k=1), {}),
    "experts that transformers fuses": ("mixtral", torch.bfloat16, NeuroAdaConfig(k=2), {}),
    "experts in one tensor": ("gpt-oss", torch.float32, NeuroAdaConfig(k=2), {}),
    "some experts, uneven rows": (
        "mixtral",
        torch.float32,
        NeuroAdaConfig(k=2, target_modules=["experts"], experts_to_transform=[1], neuron_ratio=0.5),
        {},
    ),
    "GPS with its biases and head": (
        "bert",
        torch.float32,
        GPSConfig(k=1, selection="magnitude", task_type="SEQ_CLS"),
        {},
    ),
    "convolution, attention": (
        "siglip",
        torch.float32,
        NeuroAdaConfig(k=1, target_modules="all-neurons", train_bias=True),
        {},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_merged_files_are_those_of_the_merged_model(case, tmp_path):
    name, dtype, config, save_options = CASES[case]
    base = saved_base(tmp_path / "base", name, dtype, **save_options)
    adapter = saved_adapter(tmp_path / "adapter", base, name, config)
    replaced = merge_checkpoint(base, adapter, tmp_path / "merged")
    assert replaced > 0
    assert_same_tensors(tmp_path / "merged", merged_in_memory(tmp_path / "reference", adapter, base, name))
    before, after = tensors_of(base), tensors_of(tmp_path / "merged")
    assert any(not torch.equal(before[key], after[key]) for key in before)
    loaded_base(tmp_path / "merged", name)
    assert revert_checkpoint(tmp_path / "merged", adapter, tmp_path / "back") == replaced
    assert_same_files(tmp_path / "back", base)


@pytest.fixture
def folders(tmp_path):
    base = saved_base(tmp_path / "base", "llama")
    return base, saved_adapter(tmp_path / "adapter", base, "llama"), tmp_path / "out"


def refused(capsys, arguments, *texts):
    assert cli.main(["merge", *map(str, arguments)]) == 1
    error = capsys.readouterr().err
    for text in texts:
        assert text in error, error


def test_commands(folders, tmp_path, capsys):
    base, adapter, out = folders
    assert cli.main(["merge", str(base), str(adapter), str(out)]) == 0
    assert "replaced" in capsys.readouterr().out
    assert cli.main(["merge", str(out), str(adapter), str(tmp_path / "back"), "--revert"]) == 0
    assert_same_files(tmp_path / "back", base)
    assert not (tmp_path / "back" / ORIGINALS_FILE).exists()


def _cut(base):
    (base / MODEL).write_bytes((base / MODEL).read_bytes()[:-100])


def _quantise(base):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes"}}))


MODEL, DOWN, Q = "model.safetensors", "model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.weight"
EXPERT = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
# Model, damage to its checkpoint, and what the error says.
MISFITS = {
    "another base": (
        "llama",
        edit(lambda t: t[DOWN].add_(0.5), MODEL),
        ["another base model", DOWN, "adapter_model.safetensors"],
    ),
    "a cut shard": ("llama", _cut, ["not a whole safetensors file", MODEL]),
    "a quantised base": ("llama", _quantise, ["quantised (bitsandbytes)", "unquantised"]),
    "a tensor lacking": ("llama", drop(Q, MODEL), [f"'{Q}'", "merge_and_unload"]),
    "experts of another base": (
        "mixtral",
        edit(lambda t: t[EXPERT].add_(0.1), MODEL),
        ["another base model", "experts.down_proj"],
    ),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_a_checkpoint_that_does_not_fit_is_refused_and_nothing_is_left(misfit, tmp_path, capsys):
    name, damage, words = MISFITS[misfit]
    base, out = saved_base(tmp_path / "base", name), tmp_path / "out"
    adapter = saved_adapter(tmp_path / "adapter", base, name)
    damage(base)
    refused(capsys, (base, adapter, out), *words)
    assert not out.exists()


def test_adapters_of_other_methods_are_refused(folders, tmp_path, capsys):
    base, _, out = folders
    get_peft_model(loaded_base(base, "llama"), LoraConfig()).save_pretrained(tmp_path / "lora")
    refused(capsys, (base, tmp_path / "lora", out), "LORA", "merge_and_unload")
    refused(capsys, (base, tmp_path / "nothing", out), "neither a folder nor")


def test_revert_takes_out_what_was_merged_and_nothing_else(folders, tmp_path, capsys):
    base, adapter, out = folders
    refused(capsys, (base, adapter, out, "--revert"), ORIGINALS_FILE)
    merge_checkpoint(base, adapter, out)
    other = saved_adapter(tmp_path / "other", base, "llama", NeuroAdaConfig(k=1))
    refused(capsys, (out, other, tmp_path / "back", "--revert"), "another adapter")
    tensors = load_file(out / "model.safetensors")
    for key in tensors:
        tensors[key] = tensors[key] * 2
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    refused(capsys, (out, adapter, tmp_path / "back", "--revert"), "does not hold the numbers")
    assert not (tmp_path / "back").exists()


def test_a_folder_with_files_is_left_alone(folders, capsys):
    base, adapter, out = folders
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    refused(capsys, (base, adapter, out), "has files in it")


# The checkpoint is a file with one large tensor per shard; peak and start are the process's own anonymous memory.
_MEASURED = """
import re, sys, threading, time
from peft_ext.export.merging import merge_checkpoint

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

merge_checkpoint(sys.argv[1], sys.argv[2], sys.argv[3])  # what is loaded at first use is not counted
before, peak, running = anonymous(), 0, True

def watch():
    global peak
    while running:
        peak = max(peak, anonymous())
        time.sleep(0.001)

thread = threading.Thread(target=watch)
thread.start()
merge_checkpoint(sys.argv[1], sys.argv[2], sys.argv[4])
running = False
thread.join()
print(peak - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_that_of_one_tensor(tmp_path):
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=64, hidden_size=2048, intermediate_size=12288, num_hidden_layers=2, num_attention_heads=32
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    for number, parameter in enumerate(model.parameters()):
        parameter.data.view(torch.int16).random_(14000, 16000, generator=torch.Generator().manual_seed(number))
    model.save_pretrained(tmp_path / "base", max_shard_size="250MB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    largest = max(parameter.numel() * 2 for parameter in model.parameters())
    del model
    saved_adapter(tmp_path / "adapter", tmp_path / "base", "llama", NeuroAdaConfig(k=1))
    (tmp_path / "measured.py").write_text(_MEASURED)
    folders = [tmp_path / name for name in ("base", "adapter", "one", "two")]
    done = run(tmp_path / "measured.py", *folders, output=tmp_path / "printed")
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.split()[-1])
    # Two tensors of 96 MiB at a time would be within 100 MiB of one, so half of one is the bound.
    assert peak <= 1.5 * largest, f"{peak / 2**20:.0f} MiB, largest tensor {largest / 2**20:.0f} MiB"
