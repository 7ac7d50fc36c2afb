"""Options from the command line."""

from transformers import HfArgumentParser

from peft_ext.mtl import MTLConfig


def test_options_come_from_a_command_line(tmp_path):
    arguments = ["--mtl_method", "cagrad", "--mtl_method_kwargs", '{"c": 0.5}', "--task_names", "a", "b"]
    (config,) = HfArgumentParser(MTLConfig).parse_args_into_dataclasses(["--output_dir", str(tmp_path), *arguments])
    assert config.mtl_method_kwargs == {"c": 0.5}
    assert config.task_names == ["a", "b"]
    assert MTLConfig(**config.to_dict()).mtl_method == "cagrad"
