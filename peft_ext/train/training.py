"""Run a training that a file describes."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import trl
from datasets import DatasetDict, load_dataset, load_from_disk
from trl import get_quantization_config

from ..sparse.choose.scoring import activation_scores, gradient_scores
from ..sparse.config import SparseConfig
from ..sparse.selection.plan import SCORED, parse_selection
from .options import TRAINERS, ConfigError, Run, read_run


_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


def train(path: str, options: Sequence[str] = ()) -> Any:
    """
    Train what a YAML file describes, and save the adapter into its `output_dir`.

    Args:
        path (`str`): the file, see `peft-ext train --help`.
        options (`list[str]`): further options, as on a command line.

    Returns:
        The trainer.

    Raises:
        [`ConfigError`]: if the file does not describe a run.
    """
    run = read_run(path, options)
    data = _formatted(_data(run.arguments), run.arguments)
    training, model = run.training, run.model
    init = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(training.model_init_kwargs or {}),
    }
    quantisation = get_quantization_config(model)
    if quantisation is not None:
        init["quantization_config"] = quantisation
    training.model_init_kwargs = {key: value for key, value in init.items() if value is not None}
    trainer = _trainer(run, data)
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model(training.output_dir)
    if training.push_to_hub:
        trainer.push_to_hub(dataset_name=run.arguments.dataset_name)
    return trainer


def _trainer(run: Run, data: Any) -> Any:
    arguments, training = run.arguments, run.training
    extra: dict[str, Any] = {}
    if arguments.trainer in ("grpo", "rloo"):
        extra["reward_funcs"] = [_reward(name) for name in arguments.reward_funcs or ()]
        if not extra["reward_funcs"]:
            raise ConfigError(f"reward_funcs: trainer {arguments.trainer} needs at least one, as `module.function`.")
    if arguments.trainer == "distillation":
        if not training.teacher_model_name_or_path:
            raise ConfigError("teacher_model_name_or_path: trainer distillation needs one.")
        extra["teacher_model"] = training.teacher_model_name_or_path
    evaluates = training.eval_strategy != "no"
    make = getattr(trl, f"{TRAINERS[arguments.trainer]}Trainer")

    def trainer(peft_config: Any) -> Any:
        return make(
            model=run.model.model_name_or_path,
            args=training,
            train_dataset=_split(data, arguments.dataset_train_split, "dataset_train_split"),
            eval_dataset=_split(data, arguments.dataset_test_split, "dataset_test_split") if evaluates else None,
            peft_config=peft_config,
            **extra,
        )

    config = run.peft
    if isinstance(config, SparseConfig) and parse_selection(config.selection)[0] in SCORED:
        config = _scored(config, trainer, arguments)
    return trainer(config)


def _scored(config: SparseConfig, trainer: Any, arguments: Any) -> SparseConfig:
    """The config with scores on the training data, by a trainer that is needed for nothing else."""
    if arguments.trainer != "sft":
        raise ConfigError(
            f"peft.selection: {config.selection!r} needs scores of a loss on the data, which `train` computes for "
            f"trainer sft, not {arguments.trainer}. Choose entries by magnitude, or score in Python."
        )
    base = trainer(None)
    score = gradient_scores if parse_selection(config.selection)[0] == "gradient" else activation_scores
    scored: SparseConfig = config.with_scores(
        score(base.model, base.get_train_dataloader(), config=config, max_batches=arguments.score_batches)
    )
    return scored


def _data(arguments: Any) -> Any:
    """A local file, a folder (of `save_to_disk`, or of files), or a data set on the Hub."""
    path = Path(arguments.dataset_name)
    if path.is_file():
        if path.suffix not in _BUILDERS:
            raise ConfigError(f"dataset_name: {path} is none of {', '.join(_BUILDERS)}.")
        return load_dataset(_BUILDERS[path.suffix], data_files=str(path))
    if path.is_dir() and any((path / marker).exists() for marker in ("state.json", "dataset_dict.json")):
        found = load_from_disk(str(path))
        return found if isinstance(found, DatasetDict) else DatasetDict({arguments.dataset_train_split: found})
    streaming = arguments.dataset_streaming
    try:
        return load_dataset(arguments.dataset_name, name=arguments.dataset_config, streaming=streaming)
    except (OSError, ValueError) as error:
        raise ConfigError(f"dataset_name: {arguments.dataset_name} can't be loaded ({error}).") from error


def _formatted(data: Any, arguments: Any) -> Any:
    """Rows as prompts and completions, where there are templates for them."""
    templates = {"prompt": arguments.prompt_template, "completion": arguments.completion_template}
    given = {column: template for column, template in templates.items() if template is not None}
    if not given:
        return data

    def fill(row: dict[str, Any]) -> dict[str, str]:
        try:
            return {column: template.format(**row) for column, template in given.items()}
        except (KeyError, IndexError) as error:
            raise ConfigError(
                f"prompt_template: the data have no column {error}; they have {', '.join(row)}."
            ) from error

    return DatasetDict({name: part.map(fill, remove_columns=part.column_names) for name, part in data.items()})


def _split(data: Any, name: str, key: str) -> Any:
    if name not in data:
        raise ConfigError(f"{key}: there is no split {name!r}; the data have {', '.join(map(str, data))}.")
    return data[name]


def _reward(name: str) -> Any:
    """A reward function by its import path, also of a file in the working directory; or a reward model's id."""
    module, _, function = name.rpartition(".")
    if "/" in name or not module:
        return name
    sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"reward_funcs: {name} can't be imported ({error}).") from error
    finally:
        sys.path.pop(0)
