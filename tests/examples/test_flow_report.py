"""The page of the shapes model in a browser: each view follows the slider, and shows what was measured."""

import flow_shapes
import pytest
from _shapes.flow import changes, readouts, samples
from transformers import AutoProcessor, LlavaForConditionalGeneration

from peft_ext.knockout import patch_effects, read_records
from tests.knockout._browser import Browser, needs_browser


pytestmark = needs_browser
LAYERS = 6
CHOOSE = (
    "(layer => { const s = document.getElementById('layer'); s.value = layer; s.dispatchEvent(new Event('input')); })"
)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    arguments = ["--questions", "2", "--window", "2", "--views", "1", "--out", str(folder)]
    assert flow_shapes.main([*arguments, "--report", str(folder / "page.html")]) == 0
    return folder / "page.html"


@pytest.fixture(scope="module")
def browser(page):
    opened = Browser(page.parent / "browser")
    yield opened
    opened.close()


def number(text):
    return float(text.replace("−", "-").replace("%", "").strip())


def texts(browser, selector):
    return browser.run(f"[...document.querySelectorAll({selector!r})].map(found => found.textContent)")


def test_the_slider_moves_every_view(browser, page):
    browser.open(page, "#sample=0&layer=0&show=attention")
    views = (
        "[...document.querySelectorAll('figure, .tables')].map(view => view.outerHTML.replaceAll(' class=\"\"', ''))"
    )
    names = texts(browser, "figcaption")
    assert len(names) == 7 and browser.run("document.querySelectorAll('figure, .tables').length") == 8
    before = browser.run(views)
    browser.run(f"{CHOOSE}(3)")
    after = browser.run(views)
    assert not [one for one, other in zip(before, after, strict=True) if one == other]
    browser.run(f"{CHOOSE}(0)")
    assert browser.run(views) == before
    assert browser.requests and all(url.startswith(("file:", "data:")) for url in browser.requests)
    assert not browser.errors


def test_keys_move_layer_sample_and_patch(browser, page):
    browser.open(page, "#sample=0&layer=1")
    browser.key("ArrowRight")
    assert browser.run("document.getElementById('layer-value').textContent") == "2 of 0 to 5"
    browser.key("n")
    assert browser.run("document.getElementById('sample').selectedIndex") == 1
    browser.key("p")
    assert browser.run("document.getElementById('sample').selectedIndex") == 0
    browser.run("document.querySelector('.picture svg').focus()")
    for key, patch in {"ArrowDown": 0, "ArrowRight": 1, "ArrowUp": 1}.items():
        browser.key(key)
        assert texts(browser, ".picture .readout")[0].startswith(f"Patch {patch}")
    browser.key("ArrowDown")
    assert texts(browser, ".picture .readout")[0].startswith("Patch 5")
    assert browser.run("document.getElementById('layer').value") == "2" and not browser.errors


def test_controls_have_names(browser, page):
    browser.open(page)
    browser.call("Accessibility.enable")
    roles = {"slider", "combobox", "button", "image", "table", "application"}
    named = {}
    for node in browser.call("Accessibility.getFullAXTree")["nodes"]:
        role = node.get("role", {}).get("value")
        if role in roles and not node["ignored"]:
            named.setdefault(role, []).append(node.get("name", {}).get("value", ""))
    assert named.keys() >= roles - {"image"}
    assert all(name.strip() for names in named.values() for name in names), named


def test_values_are_those_of_the_records(browser, page):
    (sweep,) = page.parent.glob("sweep_*.jsonl")
    records = read_records(sweep)
    browser.open(page, "#sample=0")
    name = texts(browser, "#sample-title")[0].removeprefix("Sample ")
    for layer in range(LAYERS):
        browser.run(f"{CHOOSE}({layer})")
        means, own = texts(browser, ".pairs .mean"), texts(browser, ".pairs .own")
        for at, pair in enumerate(flow_shapes.PAIRS):
            assert number(means[at]) == pytest.approx(changes(records, pair)[layer], abs=0.051)
            (record,) = (r for r in records if (r["sample"], r["pair"], r["layer"]) == (name, pair, layer))
            assert number(own[at]) == pytest.approx(record["change_percent"], abs=0.051)
    assert f"p = {record['base_probability']:.3f}" in texts(browser, ".answer")[0]


def test_patches_show_their_effects(browser, page):
    model = LlavaForConditionalGeneration.from_pretrained(flow_shapes.CHECKPOINT).eval()
    processor = AutoProcessor.from_pretrained(flow_shapes.CHECKPOINT)
    sample, question, _ = samples(processor, 2, 7)[0]
    expected = patch_effects(model, sample, "question", window=2)
    browser.open(page, "#sample=0&show=hidden:question")
    assert texts(browser, "#question") == [question.text]
    hover = "(at => document.querySelector(`[data-patch='${at}']`).dispatchEvent(new PointerEvent('pointerenter')))"
    seen = 0
    for layer in range(LAYERS):
        browser.run(f"{CHOOSE}({layer})")
        for record in (record for record in expected if record["layer"] == layer):
            browser.run(f"{hover}({record['unit']})")
            readout = texts(browser, ".picture .readout")[0]
            parts = dict(
                reversed(part.split(" when hidden from ")) for part in readout.split("; ") if " when " in part
            )
            assert number(parts["question"].removeprefix("answer ")) == pytest.approx(
                record["change_percent"], abs=0.1
            )
            width = float(
                browser.run(
                    f"document.querySelector(`[data-patch='{record['unit']}']`).previousSibling.getAttribute('width')"
                )
            )
            assert (width > 0) == (abs(record["change_percent"]) >= 0.05)
            seen += width > 0
    assert seen
    answers = [number(text) for text in texts(browser, ".words .answer")]
    own, _ = readouts(model, processor, [(sample, question, None)], 2)
    spelled = [record["probability"] for record in own if record["word"] == "capitalized"]
    assert answers == pytest.approx(spelled, abs=6e-4)
