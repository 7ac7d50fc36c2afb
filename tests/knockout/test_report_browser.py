"""The page in a browser: text of data is text, two runs stand beside each other, many samples open at once."""

import numpy as np
import pytest
from PIL import Image

from peft_ext.knockout import SampleView, report
from peft_ext.knockout.page.text import Piece

from ._browser import Browser, needs_browser
from ._pages import NASTY, PAIRS, records


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    opened = Browser(tmp_path_factory.mktemp("browser"))
    yield opened
    opened.close()


HEBREW = "מה צבע הכדור, אדום או ירוק?"


@needs_browser
def test_text_of_data_is_text(browser, tmp_path):
    pieces = [Piece(NASTY, [0]), Piece("", [1, 2]), Piece(HEBREW, [3])]
    groups = {NASTY: [0], "text": [0, 3]}
    view = SampleView(NASTY, HEBREW + NASTY, NASTY, problem=NASTY, pieces=pieces, groups=groups)
    page = report(
        records([NASTY], (NASTY, "a:b")),
        [view],
        tmp_path / "p.html",
        title=NASTY,
        skipped=[{"sample": NASTY, "reason": NASTY}],
    )
    browser.open(page.path)
    assert browser.run("document.title") == NASTY.strip(" ")
    assert browser.run("document.getElementById('title').textContent") == NASTY
    assert browser.run("document.getElementById('question').textContent") == HEBREW + NASTY
    assert browser.run("[...document.querySelectorAll('.piece')].map(p => p.textContent)")[:2] == [NASTY, HEBREW]
    assert browser.run("getComputedStyle(document.getElementById('question')).direction") == "rtl"
    assert browser.run("document.querySelectorAll('img').length") == 0 and not browser.errors


@needs_browser
def test_the_page_works_inside_a_frame(browser, tmp_path):
    """But for the sandbox, into which the test could not look."""
    shown = report(records(["a", "b"]), title="framed")._repr_html_().replace('sandbox="allow-scripts"', "")
    (tmp_path / "notebook.html").write_text(f"<!doctype html>{shown}")
    browser.open(tmp_path / "notebook.html")
    inside = "document.querySelector('iframe').contentDocument"
    while browser.run(f"{inside}.readyState") != "complete":
        pass
    browser.run(f"{inside}.getElementById('next').click()")
    assert browser.run(f"{inside}.title") == "framed" and not browser.errors
    assert browser.run(f"{inside}.getElementById('sample-title').textContent") == "Sample b"


@needs_browser
def test_two_runs_beside_each_other(browser, tmp_path):
    view = SampleView("one", "Why?", pieces=[Piece("", [0, 1]), Piece("Why?", [2])], patches=[0, 1])
    before, after = records(["one", "two"]), records(["one", "two"], seed=1)
    page = report({"before": before, "after": after}, {"before": [view], "after": [view]}, tmp_path / "p.html")
    browser.open(page.path, "#layer=1")
    difference = browser.run("document.querySelector('.differences td').textContent")

    def mean(own):
        return np.mean([r["change_percent"] for r in own if (r["pair"], r["layer"]) == (PAIRS[0], 1)])

    assert float(difference.replace("−", "-")) == pytest.approx(mean(after) - mean(before), abs=0.051)
    assert browser.run("[...document.querySelectorAll('#runs > .run h3')].map(h => h.textContent)") == [
        "before",
        "after",
    ]
    assert browser.run("document.querySelectorAll('.picture').length") == 2 and not browser.errors


@needs_browser
def test_five_hundred_samples_open_at_once(browser, tmp_path):
    """Those of a 7B LLaVA in size: 576 patches, 32 layers; of these fifty, in less than a second."""
    names = [f"s{at}" for at in range(500)]
    generator = np.random.default_rng(0)
    picture = Image.effect_noise((448, 336), 60).convert("RGB")
    views = [
        SampleView(
            name,
            f"question {name}?",
            image=picture if at < 50 else None,
            pieces=[Piece("", list(range(576))), Piece("why", [576])],
            groups={"image": list(range(576)), "question": [576]},
            patches=list(range(576)),
            places=[[c / 24, r / 24, (c + 1) / 24, (r + 1) / 24] for r in range(24) for c in range(24)],
            attention=generator.random((32, 577), dtype=np.float32) if at < 50 else None,
        )
        for at, name in enumerate(names)
    ]
    few = report(records(names[:50]), views[:50], tmp_path / "fifty.html", resamples=10)
    assert min(browser.open(few.path) for _ in range(3)) < 1
    many = report(records(names), views, tmp_path / "many.html", resamples=10)
    browser.open(many.path)
    start = browser.run("performance.now()")
    browser.run("document.getElementById('sample').value = 499")
    browser.run("document.getElementById('sample').dispatchEvent(new Event('change'))")
    assert browser.run("document.getElementById('sample-title').textContent") == "Sample s499"
    assert browser.run("performance.now()") - start < 1000 and not browser.errors
