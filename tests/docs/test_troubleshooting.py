"""The messages that the page on troubleshooting lists are those that the package gives."""

import ast
import re
from pathlib import Path


ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"


def _texts():
    """Every string in the package, an f-string's values being dots."""
    for path in (ROOT / "peft_ext").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_every_message_on_the_page_is_one_of_the_package():
    texts = [text.replace("`", "") for text in _texts()]
    headings = re.findall(r"^## (.+)$", PAGE.read_text(), re.M)
    messages = [message for heading in headings for message in re.findall(r"`([^`]+)`", heading)]
    messages = [
        message for message in messages if "'NEUROADA'" not in message and not re.fullmatch("'[A-Z]+'", message)
    ]
    assert len(messages) > 10
    for message in messages:
        parts = [part.strip() for part in re.split(r"'[^']*'|…", message) if part.strip()]
        for part in parts:
            assert any(part in text for text in texts), f"{message}: no string of the package has {part!r}"
