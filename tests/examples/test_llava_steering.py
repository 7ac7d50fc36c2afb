"""The factory's example end to end at the smallest size."""

import json

import llava_steering
import pytest


TINY = ["--samples", "8", "--test-samples", "8", "--steps", "2", "--align-steps", "2", "--batch-size", "4"]


@pytest.mark.parametrize("method, library", [("mores-1@1", "trl"), ("projector", "trainer")])
def test_two_stages_and_what_they_leave(method, library, tmp_path):
    out = tmp_path / "out"
    report = llava_steering.main(["--method", method, "--library", library, "--out", str(out), *TINY])
    assert report["align"]["steps"] == report["tune"]["steps"] == 2
    for name in ("before", "after"):
        assert 0 <= report[name]["exact match"] <= 100 and len(report[name]["lmar"]) == 6
    assert json.loads((out / "report.json").read_text())["method"] == method
    trained = report["tune"]["trained_parameters"]
    expected = (7296, 0) if method == "projector" else (0, 645)
    assert (trained["connector"], trained["language_model"]) == expected


WRONG = {
    "method": (["--method", "adapter"], "no bottleneck adapters"),
    "library": (["--library", "lightning"], "invalid choice"),
    "batch": (["--batch-size", "0"], "--batch-size must be at least 1"),
    "alignment": (["--align-steps", "-1"], "--align-steps must be at least 1"),
    "folder": (["--out", "."], "is there already"),
}


@pytest.mark.parametrize("options, message", WRONG.values(), ids=WRONG.keys())
def test_wrong_options_are_refused_before_anything_is_loaded(options, message, capsys):
    with pytest.raises(SystemExit):
        llava_steering.main(options)
    assert message in capsys.readouterr().err
