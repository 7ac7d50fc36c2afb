"""The `README.md` of an adapter: filled from its files, by whichever program it was saved."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..io import write_atomically
from .card_facts import CardFacts, hub_id


BEGIN = "<!-- peft_ext card: save_pretrained writes everything up to the end mark; what stands elsewhere is yours -->"
END = "<!-- end of the peft_ext card -->"
_README = "README.md"
_QUICK_START = re.compile(r"^```python\n(?=from transformers import pipeline\n)", re.M)  # in the cards of TRL
_VERSIONS = "### Framework versions"  # which PEFT adds to every card
_OF_A_PUSH = (  # what transformers' push_to_hub writes into an empty one
    "This is the model card of a 🤗 transformers model that has been pushed on the Hub. This model card has been "
    "automatically generated."
)


def complete_card(folder: str | os.PathLike[str]) -> None:
    """
    Write or complete the card of one of our adapters in a folder with both of its files; other folders are left alone.

    A folder without a card, or with PEFT's empty one, gets that of the method (`model_cards/`). In any other card the
    part between our marks is renewed, or added at the end. Front matter that others wrote is kept.
    """
    facts = CardFacts.of(Path(folder))
    if facts is None:
        return
    path = Path(folder) / _README
    fresh = ModelCard.from_template(
        ModelCardData(ignore_metadata_errors=True), template_path=str(_template(facts.method)), **facts.variables()
    )
    card = _existing(path)
    if card is None or _is_empty(card):
        data, text = card.data if card is not None else ModelCardData(), fresh.text
    else:
        data, text = card.data, _renewed(_loadable(card.text, facts), _own_part(fresh.text))
    _fill(data, facts)
    content = f"---\n{data.to_yaml()}\n---\n\n{text.strip()}\n"
    if not path.is_file() or path.read_text(encoding="utf-8") != content:
        write_atomically(str(path), content)


def complete_quietly(folder: str | os.PathLike[str]) -> None:
    """[`complete_card`] for the end of a save: a card that can't be read is a warning, not an error."""
    try:
        complete_card(folder)
    except (ValueError, OSError, TypeError) as error:
        warnings.warn(f"{Path(folder) / _README} was not completed: {error}", stacklevel=3)


def completing(save: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `ModelCard.save`, which PEFT and TRL write cards into an adapter's folder with: they are completed."""

    @wraps(save)
    def saved(self: ModelCard, filepath: Path | str) -> None:
        path = Path(filepath)
        if path.name == _README and CardFacts.of(path.parent) is not None:
            _keep_tags(self, path)
        save(self, filepath)
        if path.name == _README:
            complete_quietly(path.parent)

    return saved


def naming_cards(push_to_hub: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a `push_to_hub`: the cards of what is pushed load it by its id on the Hub."""

    @wraps(push_to_hub)
    def push(self: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        with _pushed_as(repo_id):
            return push_to_hub(self, repo_id, *args, **kwargs)

    return push


def naming_cards_in_folder(upload_folder: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `HfApi.upload_folder`, which Trainer pushes by: the same for the folder's card."""

    @wraps(upload_folder)
    def upload(self: Any, *args: Any, **kwargs: Any) -> Any:
        folder = kwargs.get("folder_path")
        if folder is not None and not kwargs.get("path_in_repo") and kwargs.get("repo_type") in (None, "model"):
            with _pushed_as(kwargs.get("repo_id")):
                complete_quietly(folder)
        return upload_folder(self, *args, **kwargs)

    return upload


@contextmanager
def _pushed_as(repo_id: str | None) -> Iterator[None]:
    token = hub_id.set(repo_id)
    try:
        yield
    finally:
        hub_id.reset(token)


def _template(method: str) -> Path:
    """In the wheel beside this file, in a checkout at its top."""
    here = Path(__file__).parent
    name = f"{method.lower()}.md"
    return next(
        path for path in (here / "model_cards" / name, here.parents[1] / "model_cards" / name) if path.is_file()
    )


def _existing(path: Path) -> ModelCard | None:
    return ModelCard.load(path, ignore_metadata_errors=True) if path.is_file() else None


def _is_empty(card: ModelCard) -> bool:
    """Whether a card is PEFT's template, which nobody has filled."""
    default = ModelCard.from_template(ModelCardData())
    text = card.text.partition(_VERSIONS)[0].replace(_OF_A_PUSH, "")
    return text.split() == default.text.partition(_VERSIONS)[0].split()


def _own_part(text: str) -> str:
    return text[text.index(BEGIN) : text.index(END) + len(END)]


def _renewed(text: str, part: str) -> str:
    """A card with our part in its place, or at the end."""
    before, found, rest = text.partition(BEGIN)
    if not found or END not in rest:
        return f"{text.rstrip()}\n\n{part}\n"
    return f"{before}{part}{rest.partition(END)[2]}"


def _loadable(text: str, facts: CardFacts) -> str:
    """TRL's card with a quick start that knows our method, and a name for the model where TRL has none yet."""
    text = _QUICK_START.sub(f"```python\nimport peft_ext  # registers {facts.method}\n", text)
    return text.replace('model="None"', f'model="{facts.adapter}"')


def _keep_tags(card: ModelCard, path: Path) -> None:
    """PEFT sets a card's tags anew each time."""
    old = _existing(path)
    if old is not None and old.data.get("tags"):
        card.data["tags"] = sorted({*(card.data.get("tags") or []), *old.data["tags"]})


def _fill(data: Any, facts: CardFacts) -> None:
    """Front matter: what only we know, and what nobody has set."""
    data["library_name"] = "peft"
    if facts.base_model:
        data["base_model"] = data.get("base_model") or facts.base_model
        data["base_model_relation"] = "adapter"
    data["tags"] = sorted({*(data.get("tags") or []), *facts.tags})
    if facts.pipeline and not data.get("pipeline_tag"):
        data["pipeline_tag"] = facts.pipeline
