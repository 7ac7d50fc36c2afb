"""Facts for the card of an adapter, read from its two files."""

from __future__ import annotations

import json
import os
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from .._version import __version__
from .files import REQUIRES


# What an adapter is called in its card: the Hub id of a push, else the name of its folder.
hub_id: ContextVar[str | None] = ContextVar("peft_ext_hub_id", default=None)
_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
# By the end of a class's name; the first that fits.
_PIPELINES = {
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForSeq2SeqLM": "text2text-generation",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "fill-mask",
    "ForImageClassification": "image-classification",
    "ForSemanticSegmentation": "image-segmentation",
    "ForObjectDetection": "object-detection",
    "ForImageTextToText": "image-text-to-text",
    "AutoModel": "feature-extraction",
}
_NOT_IN_TABLE = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "init_weights", "peft_ext_version", "peft_type",
    "peft_version", "requires", "revision", "support_sizes", "target_modules", "task_type",
}  # fmt: skip


@dataclass(frozen=True)
class CardFacts:
    """An adapter's options and the sizes of its tensors."""

    folder: Path  # where its files are
    config: dict[str, Any]  # its `adapter_config.json`

    @classmethod
    def of(cls, folder: Path) -> CardFacts | None:
        """Facts of the adapter in a folder; `None` if it holds none of our adapters with its weights."""
        try:
            config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        ours = isinstance(config, dict) and config.get("requires") == REQUIRES
        return cls(folder, config) if ours and (folder / SAFETENSORS_WEIGHTS_NAME).is_file() else None

    @property
    def method(self) -> str:
        return str(self.config["peft_type"])

    @property
    def base_model(self) -> str | None:
        found: str | None = self.config.get("base_model_name_or_path")
        return found or None

    @property
    def adapter(self) -> str:
        """Name of the adapter."""
        return hub_id.get() or self.folder.resolve().name

    @property
    def tags(self) -> set[str]:
        tags = {"peft_ext", self.method.lower(), "steering" if self.method == "MORES" else "sparse"}
        return tags | ({f"base_model:adapter:{self.base_model}"} if self.base_model else set())

    @cached_property
    def model_class(self) -> str | None:
        """The class of transformers that the base model is loaded with, as far as it can be told."""
        mapping = self.config.get("auto_mapping") or {}
        name = _AUTO_CLASSES.get(self.config.get("task_type") or "") or mapping.get("base_model_class")
        if not name and self.base_model:
            try:
                base = transformers.AutoConfig.from_pretrained(self.base_model, local_files_only=True)
            except (OSError, ValueError):
                return None
            name = next(iter(base.architectures or ()), None)
        return name if name and hasattr(transformers, name) else None

    @property
    def pipeline(self) -> str | None:
        """The Hub's name of the task."""
        name = self.model_class or ""
        if name.endswith("ForConditionalGeneration"):
            from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as SEEING

            return "image-text-to-text" if name in SEEING.values() else "text2text-generation"
        return next((tag for end, tag in _PIPELINES.items() if name.endswith(end)), None)

    def variables(self) -> dict[str, str]:
        """Of the card's template."""
        base = self.base_model
        linked = base and base.count("/") <= 1 and not os.path.exists(base)
        return {
            "name": self.adapter.rpartition("/")[2].replace("-", " "),
            "base": f"[{base}](https://huggingface.co/{base})" if linked else f"`{base}`" if base else "a model",
            "selection": str(self.config.get("selection")),
            "parameters": f"{self.counts['parameters']:,}",
            "code": self.code(),
            "table": self.table(),
        }

    def code(self) -> str:
        """Code that loads the adapter."""
        lines = [f"import peft_ext  # registers {self.method}", "from peft import PeftModel"]
        if self.base_model and self.model_class:
            labels = self._labels()
            options = f", num_labels={labels}" if labels else ""
            lines += [
                f"from transformers import {self.model_class}",
                "",
                f'base_model = {self.model_class}.from_pretrained("{self.base_model}", dtype="auto"{options})',
                f'model = PeftModel.from_pretrained(base_model, "{self.adapter}")',
            ]
        else:
            lines += ["", "# base_model is the model that the adapter was trained on"]
            lines += [f'model = PeftModel.from_pretrained(base_model, "{self.adapter}")']
        return "\n".join(lines)

    def _labels(self) -> int | None:
        """Labels of a classifier that the adapter brings."""
        if not (self.model_class or "").endswith("Classification"):
            return None
        ends = ("out_proj.weight", "classifier.weight", "score.weight")
        found = [
            shape for end in ends for key, shape in self._read[0].items() if key.endswith(end) and len(shape) == 2
        ]
        return found[0][0] if found else None

    def table(self) -> str:
        """Options, sizes and versions, as Markdown."""
        counts, config = self.counts, self.config
        targets = config.get("target_modules") or []
        if not isinstance(targets, str):
            targets = ", ".join(sorted({name.rpartition(".")[2] for name in targets}))
        rows = [("method", self.method), ("base model", self.base_model or "not named"), ("adapted layers", targets)]
        if counts["modules"]:
            share = 100 * counts["entries"] / counts["weights"]
            rows += [
                ("trained entries", f"{counts['entries']:,} in {counts['modules']:,} weights"),
                ("share of these weights", f"{share:.3g} %"),
            ]
        rows += [("trained parameters, all", f"{counts['parameters']:,}")]
        rows += [("file", f"{(self.folder / SAFETENSORS_WEIGHTS_NAME).stat().st_size / 1e6:,.2f} MB")]
        options = {key: value for key, value in sorted(config.items()) if key not in _NOT_IN_TABLE}
        rows += [(f"`{key}`", f"`{value}`") for key, value in options.items() if value not in (None, [], {})]
        versions = {"peft_ext": __version__, "PEFT": peft.__version__, "transformers": transformers.__version__}
        versions["PyTorch"] = torch.__version__
        rows += [("versions", ", ".join(f"{name} {version}" for name, version in versions.items()))]
        return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])

    @cached_property
    def counts(self) -> dict[str, int]:
        """Numbers: of trained parameters, adapted weights, entries chosen in them, and entries that they have."""
        shapes, weights = self._read
        sizes = {key: torch.Size(shape).numel() for key, shape in shapes.items()}
        sparse = [size for key, size in sizes.items() if key.endswith(".indices")]
        identity = (".indices", ".offsets", ".fingerprint")
        return {
            "parameters": sum(size for key, size in sizes.items() if not key.endswith(identity)),
            "modules": len(sparse),
            "entries": sum(sparse),
            "weights": sum(weights.values()),
        }

    @cached_property
    def _read(self) -> tuple[dict[str, list[int]], dict[str, int]]:
        """Shapes of the tensors, and numbers of entries of the adapted weights, by name."""
        path = self.folder / SAFETENSORS_WEIGHTS_NAME
        try:
            with safe_open(path, framework="pt") as file:
                keys = list(file.keys())
                shapes = {key: file.get_slice(key).get_shape() for key in keys}
                prints = {key: file.get_tensor(key) for key in keys if key.endswith(".fingerprint")}
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file ({error}).") from error
        return shapes, {key: int(found[0]) * int(found[1]) for key, found in prints.items()}
