"""Every Python snippet of README and documentation runs as it stands, page by page, on tiny models."""

import re
from functools import partialmethod
from pathlib import Path

import pytest
from trl import SFTConfig

from peft_ext.mtl import MTLSFTConfig
from tests.docs._world import make_hub, names_for


ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
BLOCK = re.compile(r"^(?P<note><!-- not run in the tests: .+ -->\n)?```python\n(?P<code>.*?)^```$", re.M | re.S)
PAGES = sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md") if BLOCK.search(path.read_text()))
README, CONTRIBUTING = "../README.md", "../CONTRIBUTING.md"


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    make_hub(folder)
    return folder


def stay_on_the_cpu(monkeypatch):
    for config in (SFTConfig, MTLSFTConfig):  # TRL's default is bf16, which transformers refuses on a CPU unasked
        monkeypatch.setattr(config, "__init__", partialmethod(config.__init__, use_cpu=True))


@pytest.mark.parametrize("page", [*PAGES, README, CONTRIBUTING])
@pytest.mark.filterwarnings("ignore")
def test_the_snippets_of_a_page_run(page, hub, monkeypatch):
    monkeypatch.chdir(hub)
    stay_on_the_cpu(monkeypatch)
    namespace = names_for(page)
    for block in BLOCK.finditer((DOCS / page).read_text()):
        if not block["note"]:
            exec(compile(block["code"], f"{page}: {block['code']}", "exec"), namespace)


def test_every_page_is_reachable():
    listed = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text()))
    assert listed == {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}


def test_every_file_that_contributing_names_is_there():
    named = set(re.findall(r"`((?:peft_ext|tests|docs)/[\w/.-]+)`", (DOCS / CONTRIBUTING).read_text()))
    assert len(named) > 20
    assert not {path for path in named if not (ROOT / path).exists()}


def test_contributing_names_what_its_files_define():
    text = (DOCS / CONTRIBUTING).read_text()
    named = re.findall(r"`(\w+)`\s+\(`(peft_ext/[\w/]+\.py)`\)", text)
    assert len(named) > 15
    for name, file in named:
        assert re.search(rf"^ *(def|class) {name}\b|^{name} = ", (DOCS / ".." / file).read_text(), re.MULTILINE), name


@pytest.mark.parametrize("page", [README, CONTRIBUTING])
def test_links_lead_to_files(page):
    linked = re.findall(r"\]\((?!https?:)([^)#\s]+)\)", (DOCS / page).read_text())
    assert linked or page == CONTRIBUTING
    assert not [path for path in linked if not (ROOT / path).exists()]


def test_the_readme_fits_on_a_screen_and_a_half():
    assert len((DOCS / README).read_text().splitlines()) <= 130
