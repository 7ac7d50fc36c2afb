"""The examples' tiny parts and shapes world, for the factory's tests."""

import sys

import pytest

from tests.examples.conftest import EXAMPLES


if str(EXAMPLES) not in sys.path:
    sys.path.insert(0, str(EXAMPLES))


@pytest.fixture(scope="session")
def composed_shapes(tmp_path_factory):
    """A folder with the parts of the shapes world and what was composed of them by the command."""
    from _shapes.parts import write_parts

    from peft_ext.cli import main

    folder = tmp_path_factory.mktemp("shapes")
    write_parts(folder)
    options = ["--text-model", "text", "--vision-tower", "tower", "--feature-layer", "-1", "--chat-template"]
    paths = [str(folder / option) if option in ("text", "tower") else option for option in options]
    assert main(["llava", "compose", str(folder / "composed"), *paths, str(folder / "template.jinja")]) == 0
    return folder
