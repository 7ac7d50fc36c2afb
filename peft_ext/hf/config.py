"""Base of all configurations: saving, reading, and state while an adapter loads."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig
from peft.utils import CONFIG_NAME

from .._version import __version__
from ..io import write_atomically
from .cards import complete_quietly
from .files import REQUIRES, check_weights
from .injection import is_wrapped


@dataclass
class SavedConfig(PeftConfig):
    """
    Base of our configurations: written whole or not at all, and naming the package that loads them.

    Args:
        peft_ext_version (`str`, *optional*), requires (`str`):
            Filled in: what wrote the adapter, and what is needed to load it.
    """

    peft_ext_version: str | None = field(default=None, metadata={"help": "Filled in when saved."})
    requires: str = field(default=REQUIRES, metadata={"help": "The package that loads this adapter."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.requires = REQUIRES
        # A config read from a file names what wrote it.
        self.from_checkpoint = self.peft_ext_version is not None
        self.awaits_weights = False  # set while an adapter waits for a checkpoint

    def to_dict(self) -> dict[str, Any]:
        """The options, and what wrote them. Only files and dictionaries name that: this object, or a copy of it, may
        choose anew for another model."""
        return {**super().to_dict(), "peft_ext_version": __version__}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json`, replacing an old one only when the new one is complete, and complete the card.
        See `PeftConfig.save_pretrained`."""
        if os.path.isfile(save_directory):
            raise ValueError(f"save_directory={save_directory!r} is a file; pass a folder.")
        os.makedirs(save_directory, exist_ok=True)
        content = {key: sorted(value) if isinstance(value, set) else value for key, value in self.to_dict().items()}
        auto_mapping = kwargs.pop("auto_mapping_dict", None)
        if auto_mapping is not None:
            content["auto_mapping"] = auto_mapping
        text = json.dumps(content, indent=2, sort_keys=True)
        write_atomically(os.path.join(save_directory, CONFIG_NAME), text)
        complete_quietly(save_directory)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """Read a config; for a local folder, first make sure that its weights are whole. See
        `PeftConfig.from_pretrained`.

        Raises:
            `ValueError`: if the weights in the folder are missing parts or differ from what was saved.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        folder = os.path.join(pretrained_model_name_or_path, subfolder or "")
        if os.path.isdir(folder) and not is_wrapped():  # where the weights are checked once
            check_weights(folder)
        return config
