"""The two stages: settings from YAML, and training with transformers' Trainer or TRL's."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import LlavaProcessor, Trainer, TrainingArguments, set_seed

from ..extras import needs
from .compose import Composed, load
from .data import Collator, load_source
from .masking import end_of_turn
from .methods import Method
from .parts import prepare, trained_by_part
from .templates import chat_template


STAGES = ("align", "tune")


@dataclass
class Settings:
    """
    What a stage does; `peft-ext llava config align` prints the defaults of the stages, with their reasons.

    Args:
        model (`str`): folder or Hub id of a composed model.
        output (`str`): folder for checkpoints, the result and `report.json`.
        data (`list[dict]`): sources, each the arguments of [`~peft_ext.factory.data.load_source`].
        streaming (`bool`): whether Hugging Face data sets are read as they come.
        vision_tower (`str` or `dict`): `frozen`, `full` or a method.
        connector (`str`): `frozen` or `full`.
        language_model (`str` or `dict`): `frozen`, `full` or a method; see [`~peft_ext.factory.methods.Method`].
        connector_learning_rate (`float`, *optional*): the connector's, where it is trained with other parts.
        chat_template (`str`, *optional*): another one than the model's, for this stage alone; see
            [`~peft_ext.factory.templates.chat_template`].
        library (`str`): `trainer` or `trl`.
        max_length (`int`): tokens of a conversation.
        resume (`bool`): whether to go on from the last checkpoint in `output`.
        arguments (`dict`): of `transformers.TrainingArguments`.
    """

    model: str
    output: str
    data: list[dict[str, Any]]
    streaming: bool = False
    vision_tower: Any = "frozen"
    connector: str = "full"
    language_model: Any = "frozen"
    connector_learning_rate: float | None = None
    chat_template: str | None = None
    library: str = "trainer"
    max_length: int | None = 2048
    resume: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("model", "output", "data"):
            if not getattr(self, name):
                raise ValueError(f"{name} is not given: name it in the YAML file or with --set {name}=….")
        if self.library not in ("trainer", "trl"):
            raise ValueError(f"library={self.library!r} is not known; use 'trainer' or 'trl'.")
        if self.streaming and int(self.arguments.get("max_steps", -1)) < 1:
            raise ValueError("streaming=True reads data without a known end; set arguments.max_steps.")
        for part in (self.vision_tower, self.language_model):
            if part != "frozen":
                Method.parse(part)  # before anything is loaded


def defaults(stage: str) -> str:
    """The YAML text of a stage's defaults.

    Raises:
        `ValueError`: if there is no such stage.
    """
    if stage not in STAGES:
        raise ValueError(f"stage={stage!r} is not known; use {' or '.join(STAGES)}.")
    return (resources.files(__package__) / "stages" / f"{stage}.yaml").read_text(encoding="utf-8")


def read_settings(stage: str, path: str | Path | None = None, changes: list[str] | None = None) -> Settings:
    """
    A stage's settings: its defaults, changed by a YAML file, changed by `changes`.

    Args:
        stage (`str`): `align` or `tune`.
        path (`str` or `Path`, *optional*): a YAML file with some of the defaults' keys.
        changes (`list[str]`, *optional*): `key=value` with dots between levels, the value in YAML.

    Raises:
        `ValueError`: naming the key that is not known.
    """
    settings = yaml.safe_load(defaults(stage))
    if path is not None:
        given = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        if not isinstance(given, dict):
            raise ValueError(f"{path} is no YAML mapping of settings.")
        _update(settings, given, str(path))
    for change in changes or ():
        name, equals, value = change.partition("=")
        if not equals:
            raise ValueError(f"--set {change}: write key=value, such as arguments.max_steps=100.")
        given = yaml.safe_load(value)
        for key in reversed(name.split(".")):
            given = {key: given}
        _update(settings, given, f"--set {change}")
    return Settings(**settings)


def _update(settings: dict[str, Any], given: dict[str, Any], where: str) -> None:
    known = {each.name for each in fields(Settings)}
    for key, value in given.items():
        if key not in known:
            raise ValueError(f"{where}: {key!r} is no setting; known are {', '.join(sorted(known))}.")
        if key == "arguments":
            settings[key] = {**settings[key], **value}
        else:
            settings[key] = value


def training_arguments(settings: Settings) -> TrainingArguments:
    """
    Raises:
        `ValueError`: if an argument is none of `TrainingArguments`.
    """
    arguments = {key: _meant(key, value) for key, value in settings.arguments.items()}
    if arguments.get("bf16") == "auto":
        arguments["bf16"] = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    if arguments.get("learning_rate") == "auto":
        parts = [part for part in (settings.language_model, settings.vision_tower) if part != "frozen"]
        arguments["learning_rate"] = Method.parse(parts[0] if parts else "full").learning_rate
    arguments.update(output_dir=settings.output, remove_unused_columns=False)
    kind: Any = TrainingArguments
    if settings.library == "trl":
        with needs("trl"):
            from trl import SFTConfig

        kind = SFTConfig
        arguments.update(max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
    unknown = set(arguments) - {each.name for each in fields(kind)}
    if unknown:
        raise ValueError(f"arguments.{sorted(unknown)[0]} is no argument of {kind.__name__}.")
    return kind(**arguments)


def _meant(key: str, value: Any) -> Any:
    """YAML reads 2e-5 as text, where 2.0e-5 is a number, and no as False."""
    if key.endswith("_strategy") and value is False:
        return "no"
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


# ---------------------------------------------------------------------- trainers


class _ForImages:
    """What a Llava's training needs beside a trainer's own: a learning rate for the connector."""

    connector_learning_rate: float | None = None

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        optimizer = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        if self.connector_learning_rate is not None:
            named = self.model.named_parameters()  # type: ignore[attr-defined]
            connector = {id(p) for name, p in named if "multi_modal_projector" in name}
            for group in list(optimizer.param_groups):
                mine = [p for p in group["params"] if id(p) in connector]
                if mine:
                    group["params"] = [p for p in group["params"] if id(p) not in connector]
                    rest = {key: value for key, value in group.items() if key != "params"}
                    optimizer.add_param_group({**rest, "params": mine, "lr": self.connector_learning_rate})
        return optimizer


def reach_all(model: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
    """
    A forward hook. The loss of a batch of text alone reaches nothing that is trained if that acts on images, which
    backward refuses and several processes wait for. Add zero times everything that is trained.
    """
    if kwargs.get("pixel_values") is None and getattr(output, "loss", None) is not None:
        output.loss = output.loss + sum(p.sum() * 0.0 for p in model.parameters() if p.requires_grad)


class LlavaTrainer(_ForImages, Trainer):
    """transformers' Trainer for a Llava."""


def _trainer(settings: Settings, composed: Composed, data: Any) -> Any:
    arguments = training_arguments(settings)
    collator = Collator(composed.processor, settings.max_length)
    options: dict[str, Any] = {"model": composed.model, "args": arguments, "train_dataset": data}
    kind: Any = LlavaTrainer
    if settings.library == "trl":
        with needs("trl"):
            from trl import SFTTrainer

        class LlavaSFTTrainer(_ForImages, SFTTrainer):
            """TRL's trainer for a Llava."""

        kind = LlavaSFTTrainer
    trainer = kind(**options, data_collator=collator, processing_class=composed.processor)
    trainer.connector_learning_rate = settings.connector_learning_rate
    return trainer


def load_data(settings: Settings, image_tokens: int) -> Any:
    """The sources, one after the other.

    Raises:
        `ValueError`: if they have different columns.
    """
    with needs("trl"):
        from datasets import concatenate_datasets

    parts = [
        load_source(**source, streaming=settings.streaming, image_tokens=image_tokens) for source in settings.data
    ]
    if len(parts) == 1:
        return parts[0]
    columns = [sorted(part.column_names or []) for part in parts]
    if any(names != columns[0] for names in columns):
        raise ValueError(f"data: the sources have different columns ({columns}); train on them one after the other.")
    return concatenate_datasets(parts)


def train(settings: Settings) -> dict[str, Any]:
    """
    Run a stage. The result, a whole model or an adapter, is saved in `settings.output` with its processor.

    Returns:
        `dict`: the report, also in `report.json`: trained parameters by part, first and last loss, steps.

    Raises:
        `ValueError`: if the settings can't be followed, before anything is trained.
    """
    arguments = training_arguments(settings)
    set_seed(arguments.seed)
    composed = load(settings.model)
    if not isinstance(composed.processor, LlavaProcessor):
        raise ValueError(
            f"model={settings.model!r} has a {type(composed.processor).__name__}; the factory trains models with a "
            "LlavaProcessor, such as those that it composes."
        )
    own_template = composed.processor.chat_template
    if settings.chat_template is not None:
        composed.processor.chat_template = chat_template(settings.chat_template, composed.processor.tokenizer)
    if composed.processor.chat_template is None:
        raise ValueError(
            f"model={settings.model!r} has no chat template; name one as chat_template, such as 'vicuna'."
        )
    end_of_turn(composed.processor)  # an error here, rather than in a worker
    data = load_data(settings, composed.model.config.image_seq_length)
    if not arguments.bf16:
        composed.model.float()
    composed.model = prepare(composed.model, settings.vision_tower, settings.connector, settings.language_model)
    for parameter in composed.model.parameters():
        if parameter.requires_grad:  # in fp32, where small steps are not lost
            parameter.data = parameter.data.float()
    counts = trained_by_part(composed.model)
    trainer = _trainer(settings, composed, data)
    if trainer.is_world_process_zero():
        print("trained parameters: " + ", ".join(f"{part} {number:,}" for part, number in counts.items()), flush=True)
    hook = composed.model.register_forward_hook(reach_all, with_kwargs=True)
    result = trainer.train(resume_from_checkpoint=settings.resume or None)
    hook.remove()
    trainer.save_model(settings.output)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    report = {
        "trained_parameters": counts,
        "steps": result.global_step,
        "training_loss": result.training_loss,
        "losses": losses,
    }
    if trainer.is_world_process_zero():
        print(f"{result.global_step} steps, loss {result.training_loss:.4f}")
        composed.processor.chat_template = own_template or composed.processor.chat_template
        composed.processor.save_pretrained(settings.output)
        Path(settings.output, "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report
