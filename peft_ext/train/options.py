"""The options of a training run, read from a YAML file. Errors name the file, the line and the key."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import trl
import yaml
from peft import PeftConfig
from trl import ModelConfig, ScriptArguments, TrlParser

from ..hf.internals import mapping


# Per name, the prefix of TRL's trainer and configuration.
TRAINERS = {
    "sft": "SFT",
    "dpo": "DPO",
    "reward": "Reward",
    "kto": "KTO",
    "grpo": "GRPO",
    "rloo": "RLOO",
    "distillation": "Distillation",
}


@dataclass
class RunArguments(ScriptArguments):
    """
    TRL's `ScriptArguments` and what a run needs beside them.

    Args:
        trainer (`str`, *optional*, defaults to `"sft"`): which trainer of TRL, a key of `TRAINERS`.
        reward_funcs (`list[str]`, *optional*): GRPO, RLOO: import paths of reward functions, `module.function`, or ids
            of reward models.
        score_batches (`int`, *optional*, defaults to 32): batches that GPS and other scored selections look at.
        prompt_template, completion_template (`str`, *optional*): how a row becomes a prompt and its completion, with
            names of columns in braces, such as `"{instruction}"`. By default the data have the columns that TRL needs.
    """

    trainer: str = field(default="sft", metadata={"help": "The trainer: " + ", ".join(TRAINERS)})
    reward_funcs: list[str] | None = field(default=None, metadata={"help": "Reward functions (module.function)."})
    score_batches: int = field(default=32, metadata={"help": "Batches that scores are computed on."})
    prompt_template: str | None = field(default=None, metadata={"help": "Prompt with {columns} of the data in it."})
    completion_template: str | None = field(default=None, metadata={"help": "Completion, the same."})


@dataclass(frozen=True)
class Run:
    """What a file describes: the arguments, TRL's training arguments, the model's, and the adapter's config."""

    arguments: Any
    training: Any
    model: Any
    peft: PeftConfig | None


class ConfigError(ValueError):
    """A file does not describe a training run."""


class _Parser(TrlParser):
    """TRL's parser, whose errors are exceptions and not the end of the process."""

    def error(self, message: str) -> Any:
        raise argparse.ArgumentTypeError(message)


def read_run(path: str, options: Sequence[str] = ()) -> Run:
    """
    Read a run from a YAML file; `options`, as on a command line, come before those of the file. Raises [`ConfigError`]
    naming file, line and key.
    """
    content, lines = _load(path)

    def wrong(key: str, reason: str) -> ConfigError:
        return ConfigError(f"{path}:{lines.get(key, 1)}: {key}: {reason}")

    peft_block = content.pop("peft", None)
    given = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    given.add_argument("--trainer", default=content.get("trainer", "sft"))
    name = given.parse_known_args(list(options))[0].trainer
    named = {option.partition("=")[0].removeprefix("--") for option in options if option.startswith("--")}
    if name not in TRAINERS:
        raise wrong("trainer", f"{name!r} is not known; choose one of {', '.join(TRAINERS)}.")
    if not hasattr(trl, f"{TRAINERS[name]}Trainer"):
        raise wrong("trainer", f"this TRL ({trl.__version__}) has no {TRAINERS[name]}Trainer; install a newer one.")
    for key, value in content.pop("env", {}).items():
        os.environ[key] = str(value)
    training_class = getattr(trl, f"{TRAINERS[name]}Config")
    parser = _Parser((RunArguments, training_class, ModelConfig), prog="peft-ext train")
    unknown = parser.set_defaults_with_config(**content)
    if unknown:
        raise wrong(
            unknown[0].removeprefix("--"), f"no option of {training_class.__name__}, ModelConfig or the command."
        )
    peft_config = None if peft_block is None else _peft_config(peft_block, wrong)
    for key in ("model_name_or_path", "dataset_name", "output_dir"):
        if not content.get(key) and key not in named:
            raise wrong(key, "is missing.")
    if content.get("use_peft") or "use_peft" in named:
        raise wrong("use_peft", "builds a LoRA in TRL's way; describe the adapter in `peft:` instead.")
    try:
        arguments, training, model = parser.parse_args_and_config(list(options))
    except (ValueError, TypeError, argparse.ArgumentTypeError, argparse.ArgumentError) as error:
        key = next((key for key in content if f"{key}" in str(error).split() or f"--{key}" in str(error)), "trainer")
        raise wrong(key, str(error)) from error
    return Run(arguments, training, model, peft_config)


def _load(path: str) -> tuple[dict[str, Any], dict[str, int]]:
    """A YAML file's content, and the line of each key; nested ones as `peft.k`."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
        node = yaml.compose(text)
        content = yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: no YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}:1: a run is a mapping of options, such as `model_name_or_path: …`.")
    lines: dict[str, int] = {}
    for key, value in node.value:
        lines[key.value] = key.start_mark.line + 1
        for inner, _ in value.value if isinstance(value, yaml.MappingNode) else ():
            lines[f"{key.value}.{inner.value}"] = inner.start_mark.line + 1
    return content, lines


def _peft_config(block: Any, wrong: Any) -> PeftConfig:
    if not isinstance(block, dict):
        raise wrong("peft", "must be a block with peft_type and the method's options.")
    given = dict(block)
    method = str(given.pop("peft_type", "")).upper()
    known = {str(getattr(member, "value", member)): cls for member, cls in mapping.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if method not in known:
        raise wrong(
            "peft.peft_type", f"{method or 'missing'!s} is no method of PEFT; choose one of {', '.join(known)}."
        )
    config_class = known[method]
    names = {item.name for item in fields(config_class) if item.init}
    for key in given:
        if key not in names:
            raise wrong(f"peft.{key}", f"no option of {config_class.__name__}.")
    try:
        return config_class(**given)
    except (ValueError, TypeError) as error:
        key = next((key for key in given if str(error).startswith(f"{key}=") or f"`{key}`" in str(error)), None)
        raise wrong("peft" if key is None else f"peft.{key}", str(error)) from error
