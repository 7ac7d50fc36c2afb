"""
All that importing peft_ext changes in other packages, beside the methods that it registers.

- `PeftModel.from_pretrained`, `PeftModel.load_adapter` and transformers' `PeftAdapterMixin.load_adapter`, because they
  inject an adapter before they read its tensors, and have no hook that tells a method that a file follows, or that
  loading failed. The wrapper checks a folder whose config names this package, and acts once one of our tuners injects.
- `PeftModel.save_pretrained` and transformers' `PreTrainedModel.save_pretrained`, because they have no hook around the
  writing of a file. The wrapper acts where one of our adapters is saved.
- `ModelCard.save` and `HfApi.upload_folder` of huggingface_hub and both libraries' `push_to_hub`, because PEFT,
  Trainer and TRL write and push an adapter's card without asking its method; see `hf/cards.py`. The wrapper acts in
  the folders of our adapters. transformers' models get the `create_or_update_model_card` that Trainer calls after it
  has written a card.

Adapters of other methods are saved and loaded by PEFT's and transformers' own code alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from huggingface_hub import HfApi, ModelCard
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.integrations.peft import PeftAdapterMixin

from ..hf.cards import complete_quietly, completing, naming_cards, naming_cards_in_folder
from .loading import all_or_nothing, whole_model
from .saving import whole_files


def install() -> None:
    """Wrap the methods. Calling it again, also after a reload, wraps the originals anew."""
    PeftModel.from_pretrained = classmethod(_ours(whole_model, PeftModel.from_pretrained.__func__))
    PeftModel.load_adapter = _ours(all_or_nothing, PeftModel.load_adapter, "model_id")
    PeftAdapterMixin.load_adapter = _ours(all_or_nothing, PeftAdapterMixin.load_adapter, "peft_model_id")
    PeftModel.save_pretrained = _ours(whole_files, PeftModel.save_pretrained)
    PreTrainedModel.save_pretrained = _ours(whole_files, PreTrainedModel.save_pretrained)
    ModelCard.save = _ours(completing, ModelCard.save)  # type: ignore[method-assign]
    for owner in (PeftModel, PreTrainedModel):
        owner.push_to_hub = _ours(naming_cards, owner.push_to_hub)
    HfApi.upload_folder = _ours(naming_cards_in_folder, HfApi.upload_folder)  # type: ignore[method-assign]
    if not hasattr(PeftAdapterMixin, "create_or_update_model_card"):
        PeftAdapterMixin.create_or_update_model_card = lambda self, output_dir: complete_quietly(output_dir)


def _ours(wrap: Callable[..., Any], method: Any, *args: Any) -> Any:
    original = method.__wrapped__ if hasattr(method, "wrapped_by_peft_ext") else method
    wrapper = wrap(original, *args)
    wrapper.wrapped_by_peft_ext = True
    return wrapper
