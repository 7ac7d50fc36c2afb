"""An adapter's files, read without a model: its options, and module by module its entries."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from torch import Tensor

from ..hf.adapter_state import PEFT_PREFIX
from ..hf.files import CHECKSUM_KEY, check_weights
from ..hf.loadable import tuner_of
from ..sparse.fingerprint import check_fingerprint
from ..sparse.model.sparse_model import SparseModel
from ..sparse.support import Support
from .checkpoint import local_folder


_TOKENS = ".token_adapter.trainable_tokens_delta"
_PARTS = {"weight", "bias", "indices", "offsets", "fingerprint"}


@dataclass(frozen=True)
class Entries:
    """What an adapter trains in one module."""

    support: Support  # which entries, of the weight as `[rows, fan_in]`
    values: Tensor  # what is added to them, in the shape of the support's indices
    fingerprint: Tensor  # of the base weight
    bias: Tensor | None  # what is added to the layer's bias


class AdapterFile:
    """
    An adapter in a folder or on the Hub, read tensor by tensor: a context manager, which keeps the file open. Raises
    `ValueError` if there is no adapter, or its file is damaged.
    """

    def __init__(self, adapter: str | os.PathLike[str]) -> None:
        self.name = os.fspath(adapter)
        self.folder = local_folder(adapter, ["adapter_*"])
        self.path = self.folder / SAFETENSORS_WEIGHTS_NAME
        for path in (self.folder / CONFIG_NAME, self.path):
            if not path.is_file():
                raise ValueError(f"{self.folder} is no adapter: it has no {path.name}.")
        self.config = _config(self.folder)
        check_weights(str(self.folder))
        self._open = ExitStack()
        self._file: Any = self._open.enter_context(safe_open(self.path, framework="pt"))
        self.keys: list[str] = sorted(self._file.keys())

    def __enter__(self) -> AdapterFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    @property
    def method(self) -> str:
        return str(getattr(self.config.peft_type, "value", self.config.peft_type))

    @property
    def is_sparse(self) -> bool:
        return issubclass(tuner_of(self.config), SparseModel)

    @property
    def checksum(self) -> str | None:
        """Checksum of the file's content, if the file names it."""
        found: str | None = (self._file.metadata() or {}).get(CHECKSUM_KEY)
        return found

    def tensor(self, key: str) -> Tensor:
        return self._file.get_tensor(key)

    def require_sparse(self, what: str) -> None:
        """
        Raises:
            `ValueError`: if the adapter is none of peft_ext's sparse ones.
        """
        if not self.is_sparse:
            raise ValueError(
                f"{self.name} is a {self.method} adapter; {what} works for the sparse methods of peft_ext. Load it "
                "with PeftModel.from_pretrained, and save what merge_and_unload() returns, if the method merges."
            )

    @property
    def modules(self) -> list[str]:
        """The adapted modules, by the names that they have in the model."""
        return sorted(self._parts)

    @cached_property
    def _container(self) -> str:
        """The part of a tensor's name that follows its module's."""
        container: str = tuner_of(self.config).tuner_layer_cls.adapter_layer_names[0]
        return container

    @cached_property
    def _parts(self) -> dict[str, set[str]]:
        """Per adapted module, the names of its tensors."""
        parts: dict[str, set[str]] = {}
        for key in self.keys:
            module, mark, part = key.removeprefix(PEFT_PREFIX).rpartition(f".{self._container}.")
            if mark and part not in _PARTS:
                raise ValueError(f"{self.path}: '{key}' is no tensor that this version of peft_ext knows.")
            if mark:
                parts.setdefault(module, set()).add(part)
        return parts

    def entries(self, module: str) -> Entries:
        """
        The entries of one module.

        Raises:
            `ValueError`: if they don't fit together.
        """
        prefix = f"{module}.{self._container}."
        found = {part: self.tensor(self._key(prefix + part)) for part in self._parts[module]}
        lacking = sorted({"weight", "indices", "fingerprint"} - found.keys())
        if lacking:
            raise ValueError(f"{self.path} lacks '{prefix}{lacking[0]}'. Save the adapter again.")
        fingerprint = found["fingerprint"]
        try:
            support = Support.of_integers(found["indices"], int(fingerprint[1]), found.get("offsets"))
            check_fingerprint(fingerprint, support.rows, support.fan_in)
        except ValueError as error:
            raise ValueError(f"{self.path}: '{prefix}indices' is corrupted: {error}.") from error
        return Entries(support, found["weight"], fingerprint, found.get("bias"))

    def _key(self, name: str) -> str:
        return name if name in self.keys else f"{PEFT_PREFIX}{name}"

    def whole(self) -> Iterator[tuple[str, str]]:
        """Tensors that replace the base's: modules trained whole, trained biases; their names in model and file."""
        for key in self.keys:
            name = key.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".")
            if f".{self._container}." not in key and not key.endswith(_TOKENS):
                yield name, key

    def tokens(self) -> Iterator[tuple[str, str, list[int]]]:
        """Trained tokens: the embedding's name in the model, the tensor's in the file, and the tokens."""
        for key in self.keys:
            if key.endswith(_TOKENS):
                module = key.removeprefix(PEFT_PREFIX).removesuffix(_TOKENS)
                given: Any = self.config.trainable_token_indices
                if isinstance(given, dict):
                    given = next((which for name, which in given.items() if module.endswith(name)), None)
                if given is None:
                    raise ValueError(f"{self.path} has '{key}', but {CONFIG_NAME} does not say which tokens it is of.")
                yield module, key, list(given)


def _config(folder: Path) -> PeftConfig:
    try:
        return PeftConfig.from_pretrained(str(folder))
    except KeyError as error:
        raise ValueError(f"{folder / CONFIG_NAME}: the method {error} is not known to this PEFT.") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder / CONFIG_NAME} is no JSON: {error}.") from error
