"""Δm against figures printed in the literature, both ways of averaging."""

import pytest

from peft_ext.mtl import relative_task_drop


NAMES = ["miou", "pix", "abs", "rel", "mean", "median", "11", "22", "30"]
TASK_OF = {"miou": "seg", "pix": "seg", "abs": "depth", "rel": "depth"}
HIGHER = {name: name in ("miou", "pix", "11", "22", "30") for name in NAMES}


def nyuv2(values):
    tasks = {"seg": {}, "depth": {}, "normal": {}}
    for name, value in zip(NAMES, values, strict=True):
        tasks[TASK_OF.get(name, "normal")][name] = value
    return tasks


SINGLE_MTAN = nyuv2([38.30, 63.76, 0.6754, 0.2780, 25.01, 19.21, 30.14, 57.20, 69.15])
SINGLE_SAM = nyuv2([58.62, 79.20, 0.3810, 0.1553, 19.29, 12.64, 46.37, 72.19, 80.73])
JOINT_MTAN = nyuv2([39.29, 65.33, 0.5493, 0.2263, 28.15, 23.96, 22.09, 47.50, 61.08])
FAMO_MTAN = nyuv2([38.88, 64.90, 0.5474, 0.2194, 25.06, 19.57, 29.21, 56.61, 68.98])
JOINT_SAM = nyuv2([59.09, 79.61, 0.3348, 0.1360, 22.34, 16.33, 35.46, 64.02, 75.20])


@pytest.mark.parametrize(
    ("values", "baseline", "flat", "by_task"),
    [
        (JOINT_MTAN, SINGLE_MTAN, 5.59, -0.88),
        (FAMO_MTAN, SINGLE_MTAN, -4.10, -6.79),
        (JOINT_SAM, SINGLE_SAM, 6.76, 1.47),
    ],
    ids=["joint-mtan", "famo-mtan", "joint-sam"],
)
def test_published_tables_average_over_metrics(values, baseline, flat, by_task):
    assert relative_task_drop(values, baseline, HIGHER) == pytest.approx(flat, abs=0.006)
    assert relative_task_drop(values, baseline, HIGHER, reduction="tasks") == pytest.approx(by_task, abs=0.006)


def test_equal_numbers_of_metrics_make_no_difference():
    single = {"azimuth": {"top1": 32.92, "top5": 70.06}, "elevation": {"top1": 36.56, "top5": 94.67}}
    joint = {"azimuth": {"top1": 28.01, "top5": 67.05}, "elevation": {"top1": 29.84, "top5": 89.75}}
    both = [relative_task_drop(joint, single, {"top1": True, "top5": True}, r) for r in ("metrics", "tasks")]
    assert both == pytest.approx([10.70, 10.70], abs=0.006)


def test_the_same_name_may_mean_two_things():
    higher = {"seg": {"x": True}, "depth": {"x": False}}
    assert (
        relative_task_drop({"seg": {"x": 2.0}, "depth": {"x": 2.0}}, {"seg": {"x": 1.0}, "depth": {"x": 1.0}}, higher)
        == 0
    )
    assert relative_task_drop(SINGLE_SAM, SINGLE_SAM, HIGHER) == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reduction": "sum"}, "reduction='sum'"),
        ({"baseline": {"b": {"x": 1.0}}}, "the baseline"),
        ({"metrics": {"a": {"y": 1.0}}}, "metrics"),
        ({"higher_is_better": {}}, "higher_is_better"),
        ({"baseline": {"a": {"x": 0.0}}}, "baseline above 0"),
        ({"baseline": {"a": {"x": -1.0}}}, "baseline above 0"),
        ({"metrics": {"a": {"x": float("nan")}}}, "must be finite"),
    ],
)
def test_mistakes_are_named(arguments, message):
    one = {"a": {"x": 1.0}}
    with pytest.raises(ValueError, match=message):
        relative_task_drop(**{"metrics": one, "baseline": one, "higher_is_better": {"x": True}, **arguments})
