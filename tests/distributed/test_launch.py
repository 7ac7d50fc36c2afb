"""examples/accelerate: accelerate reads its configurations, and two processes launched with them train as one does."""

import os
from pathlib import Path

import pytest
import torch
from accelerate.commands import launch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from safetensors.torch import load_file

from tests._processes import launch as launch_processes


ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "accelerate"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def config_file(name):
    return str(FOLDER / f"{name}.yaml")


# ------------------------------------------------------------------ read


@pytest.fixture
def launched(monkeypatch):
    """Function: configuration and options to the arguments `accelerate launch` makes of them, and its launcher."""
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        monkeypatch.delenv(name)

    def read(name, *options):
        found = []
        for launcher in ("multi_gpu_launcher", "deepspeed_launcher", "simple_launcher"):
            monkeypatch.setattr(launch, launcher, lambda args, launcher=launcher: found.append((args, launcher)))
        line = ["--config_file", config_file(name), "--main_process_port", "0", *options, "train.py"]
        launch.launch_command(launch.launch_command_parser().parse_args(line))
        return found[0]

    return read


@pytest.mark.parametrize("name", NAMES)
def test_every_key_is_one_of_accelerates(launched, name):
    config = load_config_from_file(config_file(name))  # refuses unknown keys of the first level
    known = vars(launch.launch_command_parser().parse_args(["train.py"])).keys()
    assert {*config.fsdp_config, *config.deepspeed_config} <= known
    args, launcher = launched(name)
    assert args.num_processes == 2 and args.mixed_precision == ("no" if name == "ddp" else "bf16")
    assert launcher == ("deepspeed_launcher" if name == "zero3" else "multi_gpu_launcher")


@pytest.mark.parametrize("name", ["fsdp1", "fsdp2"])
def test_fsdp_gathers_what_is_saved(launched, monkeypatch, name):
    for key, value in prepare_multi_gpu_env(launched(name)[0]).items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr("accelerate.utils.dataclasses.is_cuda_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == int(name[-1]) and plugin.state_dict_type.name == "FULL_STATE_DICT"
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert not plugin.cpu_ram_efficient_loading
    if name == "fsdp1":  # frozen and trained parameters lie in one flat parameter
        assert plugin.use_orig_params and plugin.sync_module_states
    else:
        assert plugin.reshard_after_forward is True


def test_zero3_gathers_what_is_saved(launched, monkeypatch):
    for key, value in prepare_deepspeed_cmd_env(launched("zero3")[0])[1].items():
        monkeypatch.setenv(key, value)
    plugin = DeepSpeedPlugin()  # needs no DeepSpeed
    assert plugin.zero_stage == 3 and plugin.zero3_save_16bit_model and not plugin.zero3_init_flag
    assert plugin.deepspeed_config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True


# ------------------------------------------------------------------ run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Function: name of a run and its processes to what the script prints, and the adapter that it saves."""
    folder = tmp_path_factory.mktemp("launched")
    letters = torch.randint(97, 123, (1000,), generator=torch.Generator().manual_seed(0))
    (folder / "text").write_text("".join(map(chr, letters)))

    def start(name, processes, *before, environment=None):
        target, *rest = [*before, str(FOLDER / "train.py")]
        options = ["--text", str(folder / "text"), "--out", str(folder / name), "--steps", "3", "--length", "16"]
        launch_processes(target, folder / f"{name} logs", processes, *rest, *options, environment=environment)
        printed = (folder / f"{name} logs" / "log0.1").read_text()
        return printed, load_file(folder / name / "adapter_model.safetensors")

    return start


@pytest.fixture(scope="module")
def one(run):
    return run("one", 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp1", "fsdp2"])
def test_two_processes_train_and_save_what_one_does(run, one, launched, name):
    """In the environment that `accelerate launch` gives to processes; starting them is torch's."""
    environment = prepare_multi_gpu_env(launched(name, "--mixed_precision", "no")[0])
    before = [] if name == "ddp" else ["tests.distributed._fsdp_on_cpu"]
    printed, saved = run(name, 2, *before, environment=environment)
    assert f"2 processes, DistributedType.{'FSDP' if name != 'ddp' else 'MULTI_'}" in printed
    together, alone = losses(printed)
    assert together == pytest.approx(alone, abs=2e-6)  # printed with six digits
    assert together == pytest.approx(losses(one[0])[0], abs=1e-5)
    assert saved.keys() == one[1].keys()
    for key, tensor in one[1].items():
        # Three steps of AdamW move a value by 0.03; sums over samples are taken in another order.
        torch.testing.assert_close(saved[key], tensor, rtol=0, atol=1e-3 if tensor.is_floating_point() else 0)
    assert max(float(t.abs().max()) for t in one[1].values() if t.is_floating_point()) > 0.02


def losses(printed):
    """Of the trained model, and of the saved adapter in one process."""
    line = next(line for line in printed.splitlines() if line.startswith("loss after training"))
    return [float(word.strip(",")) for word in line.split() if word[0].isdigit()]
