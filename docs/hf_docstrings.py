"""Griffe extension: lets mkdocstrings read docstrings in the style of Hugging Face."""

import ast
import re
from pathlib import Path
from typing import Any

from griffe import Extension, Object


PACKAGES = ("peft_ext.knockout", "peft_ext.mtl", "peft_ext")
LINK = re.compile(r"\[`~?([\w.]+)`\]")
ARGUMENT = re.compile(r"^(?P<indent> +)(?P<name>[*\w]+) \((?P<type>.+)\):", re.M)
SECTION = re.compile(r"^(Raises|Returns|Warns):\n(?:(?: +.*)?\n)*", re.M)
SNIPPET = re.compile(r"^(Example|Usage):\n\n(?P<code>(?:(?: +.*)?(?:\n|\Z))+)", re.M)


def _public_names() -> dict[str, str]:
    """Where each public name is documented, read without importing anything."""
    names = {}
    for package in PACKAGES:
        for file in ("__init__.py", "api.py"):
            path = Path(*package.split("."), file)
            for node in ast.parse(path.read_text()).body if path.is_file() else ():
                if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                    names |= {name: f"{package}.{name}" for name in ast.literal_eval(node.value)}
    return names


class HuggingFaceDocstrings(Extension):
    """Rewrites a docstring to what griffe's parser of Google's style understands."""

    def __init__(self) -> None:
        self.public = _public_names()

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = self._rewrite(obj.docstring.value)

    def _rewrite(self, text: str) -> str:
        text = SNIPPET.sub(self._snippet, text)
        text = SECTION.sub(self._section, text)
        text = ARGUMENT.sub(self._argument, text)
        return LINK.sub(self._link, text)

    def _argument(self, match: re.Match[str]) -> str:
        # The default comes from the signature.
        kind = re.sub(r",? ?\*optional\*(, defaults to .*)?$", "", match["type"])
        kind = LINK.sub(r"\1", kind).replace("`, `", " | ").replace("`", "").replace(" or ", " | ")
        return f"{match['indent']}{match['name']} ({kind}):" if kind else f"{match['indent']}{match['name']}:"

    def _section(self, match: re.Match[str]) -> str:
        return re.sub(r"^(    )\[?`([^`]+)`\]?:", r"\1\2:", match[0], flags=re.M)

    def _snippet(self, match: re.Match[str]) -> str:
        lines = match["code"].rstrip().splitlines()
        indent = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
        code = "\n".join(line[indent:] for line in lines).replace("```py\n>>>", "```pycon\n>>>")
        return f"**{match[1]}**\n\n{code}\n"

    def _link(self, match: re.Match[str]) -> str:
        name = match[1].rpartition(".")[2] if match[1] not in self.public else match[1]
        if name not in self.public:
            return f"`{match[1]}`"
        return f'<autoref identifier="{self.public[name]}" optional><code>{name}</code></autoref>'
