"""A model's safetensors checkpoint on disk: read tensor by tensor, and copied with some of its tensors changed."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
from torch import Tensor


INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"
_OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".originals")
_COPIED_AT_ONCE = 2**23  # bytes
Result = TypeVar("Result")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies."""

    file: str  # name of the file in the checkpoint's folder
    dtype: str  # as safetensors names it, such as `"BF16"`
    shape: tuple[int, ...]  # its shape
    start: int  # its first byte in the file
    end: int  # the byte after its last


class Checkpoint:
    """
    The weights of a model in a folder, in one safetensors file or several; those of a Hub id are downloaded. Raises
    `ValueError` if there are no such weights, or a file is cut short.
    """

    def __init__(self, base: str | os.PathLike[str]) -> None:
        self.folder = local_folder(base)
        self.tensors: dict[str, Stored] = {}
        for file in self._files():
            self.tensors.update(_header(self.folder / file))
        self.config: dict[str, Any] = _json(self.folder / "config.json")
        quantised = self.config.get("quantization_config")
        if quantised:
            how = quantised.get("quant_method", "quantised")
            raise ValueError(
                f"{self.folder}: the checkpoint is quantised ({how}), so its tensors are no weights that values could "
                "be added to. Pass the unquantised model that it was made from; peft_ext checks that the adapter fits."
            )

    def _files(self) -> list[str]:
        index = self.folder / INDEX_FILE
        if index.is_file():
            return sorted(set(_json(index)["weight_map"].values()))
        if (self.folder / WEIGHTS_FILE).is_file():
            return [WEIGHTS_FILE]
        found = sorted(path.name for path in self.folder.glob("*") if path.suffix in _OTHER_WEIGHTS)
        raise ValueError(
            f"{self.folder} has neither {WEIGHTS_FILE} nor {INDEX_FILE}"
            + (f", but {', '.join(found[:3])}" if found else "")
            + ". Load the model in transformers and save_pretrained() it, which writes safetensors."
        )

    def read(self, key: str) -> Tensor:
        """A tensor, in memory of its own."""
        stored = self.tensors[key]
        with open(self.folder / stored.file, "rb") as file:
            return _read(file, key, stored)[1]

    def copy_changed(self, out: Path, changes: Mapping[str, Callable[[Tensor], Result]]) -> dict[str, Result]:
        """
        Write the checkpoint into another folder, file by file, with the configuration and tokenizer beside it.

        All bytes are copied but those of the tensors in `changes`, each of which is read, changed in place by its
        function and written. One of them is in memory at a time. Returns the functions' results.
        """
        results = {}
        for file in self._files():
            mine = [(key, stored) for key, stored in self.tensors.items() if stored.file == file and key in changes]
            with open(self.folder / file, "rb") as source, open(out / file, "wb") as target:
                for key, stored in sorted(mine, key=lambda item: item[1].start):
                    _copy(source, target, stored.start - source.tell())
                    buffer, tensor = _read(source, key, stored)
                    results[key] = changes[key](tensor)
                    target.write(buffer)
                    del buffer, tensor  # or the next one would be read beside it
                shutil.copyfileobj(source, target, _COPIED_AT_ONCE)
        for path in self.folder.iterdir():
            if path.is_file() and (path.name == INDEX_FILE or self._is_companion(path)):
                shutil.copyfile(path, out / path.name)
        return results

    @staticmethod
    def _is_companion(path: Path) -> bool:
        return (
            path.suffix not in _OTHER_WEIGHTS
            and not path.name.endswith(".index.json")
            and not path.name.startswith((".", "adapter_"))
            and path.name != "README.md"  # which is about the base
        )


def local_folder(name: str | os.PathLike[str], patterns: list[str] | None = None) -> Path:
    """
    A local folder, or a Hub id's snapshot.

    Raises:
        `ValueError`: if there is neither.
    """
    path = Path(name)
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = patterns or ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.py"]
    try:
        return Path(snapshot_download(os.fspath(name), allow_patterns=wanted))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(f"{name!s} is neither a folder nor a model that can be downloaded ({error}).") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}.") from error
    return content


def _header(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file: a length of 8 bytes, that much JSON, and the bytes of the tensors."""
    size = path.stat().st_size if path.is_file() else 0
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= size - 8:
                raise ValueError("its header is longer than the file")
            content = json.loads(file.read(length))
        first = 8 + length
        stored = {
            key: Stored(path.name, item["dtype"], tuple(item["shape"]), *(first + end for end in item["data_offsets"]))
            for key, item in content.items()
            if key != "__metadata__"
        }
        if max((tensor.end for tensor in stored.values()), default=first) != size:
            raise ValueError("its tensors don't fill the file")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}). Download or save it again.") from error
    return stored


def _read(file: IO[bytes], key: str, stored: Stored) -> tuple[bytearray, Tensor]:
    """A tensor's bytes, and the tensor that lies on them."""
    if stored.dtype not in _DTYPES:
        raise ValueError(f"'{key}' in {stored.file} is stored as {stored.dtype}, which can't be changed.")
    buffer = bytearray(stored.end - stored.start)
    file.seek(stored.start)
    file.readinto(buffer)  # type: ignore[attr-defined]
    dtype = _DTYPES[stored.dtype]
    if len(buffer) != math.prod(stored.shape) * dtype.itemsize:
        raise ValueError(f"'{key}' in {stored.file} has {len(buffer)} bytes, which is no {stored.shape} {dtype}.")
    if not buffer:
        return buffer, torch.empty(stored.shape, dtype=dtype)
    return buffer, torch.frombuffer(buffer, dtype=dtype).view(stored.shape)


def _copy(source: IO[bytes], target: IO[bytes], count: int) -> None:
    while count:
        part = source.read(min(count, _COPIED_AT_ONCE))
        target.write(part)
        count -= len(part)
