"""Options from the command line, and what the package offers without a trainer."""

import subprocess
import sys

from transformers import HfArgumentParser

from peft_ext.mtl import MTLConfig


def test_options_come_from_a_command_line(tmp_path):
    arguments = ["--mtl_method", "cagrad", "--mtl_method_kwargs", '{"c": 0.5}', "--task_names", "a", "b"]
    (config,) = HfArgumentParser(MTLConfig).parse_args_into_dataclasses(["--output_dir", str(tmp_path), *arguments])
    assert config.mtl_method_kwargs == {"c": 0.5}
    assert config.task_names == ["a", "b"]
    assert MTLConfig(**config.to_dict()).mtl_method == "cagrad"


def test_the_package_loads_multi_task_training_on_first_use_only():
    code = (
        "import sys, peft_ext; assert 'peft_ext.mtl' not in sys.modules; import torch;"
        "print(peft_ext.mtl.aggregate(torch.eye(2), method='mgda').tolist()); assert 'matplotlib' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[0.5")
