"""The pytest plugin that turns PEFT's tests on another config. `run.py` loads it into every process."""

import contextlib
import importlib
import os
from collections.abc import Callable, Generator
from functools import lru_cache
from typing import Any

import pytest
from peft import PeftConfig

from . import scope
from .cases import convert_rows, mentions_config, targeted_layers
from .methods import METHODS
from .recorder import UNTOUCHED, recorder_of
from .stand_in import as_lora, equal_toy_models, take_places


METHOD = METHODS[os.environ.get("PEFT_EXT_UPSTREAM_METHOD", "neuroada")]
_BUILT_BEFORE = pytest.StashKey[int]()

_built = 0  # how many configs of the method were constructed so far
_wide_fixtures: set[str] = set()  # fixtures that serve several tests and constructed one


def pytest_configure(config: pytest.Config) -> None:
    for marker in ("single_gpu_tests", "multi_gpu_tests", "regression", "bitsandbytes"):
        config.addinivalue_line("markers", f"{marker}: a marker of PEFT's tests")
    recorder_of(config)
    # It goes online for the first use of a model; here all models are local.
    setattr(importlib.import_module("tests.testing_utils"), "hub_online_once", contextlib.nullcontext)  # noqa: B010
    # On CPUs with AVX512-BF16 bitsandbytes repacks 4-bit weights for inference, and crashes on the narrow layers here.
    with contextlib.suppress(ImportError):
        setattr(importlib.import_module("bitsandbytes.nn.modules"), "has_avx512bf16", lambda: False)  # noqa: B010
    _count_configs(METHOD.config_class)


def _count_configs(config_class: type[PeftConfig]) -> None:
    original = config_class.__post_init__

    def counting(self: PeftConfig) -> None:
        global _built
        _built += 1
        original(self)

    config_class.__post_init__ = counting


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    module = metafunc.module.__name__.rpartition(".")[2].removeprefix("test_")
    markers = metafunc.definition.own_markers
    for position, mark in enumerate(markers):
        if mark.name != "parametrize":
            continue
        names, rows = mark.args[0], list(mark.args[1])
        names = tuple(name.strip() for name in names.split(",")) if isinstance(names, str) else tuple(names)
        if mentions_config(rows):
            extra = scope.SETTINGS.get(module, {})
            converted, leftovers = convert_rows(names, rows, METHOD, _layers_of(metafunc.module), extra)
            options = {key: value for key, value in mark.kwargs.items() if key != "ids" or callable(value)}
            markers[position] = pytest.mark.parametrize(",".join(names), converted, **options).mark
            for row, reason in leftovers.items():
                recorder_of(metafunc.config).note_row(module, row, reason)


def _layers_of(module: Any) -> Callable[[str, Any], frozenset[str]]:
    models = getattr(module, "MockTransformerWrapper", None)

    @lru_cache
    def layers(model_id: str, targets: str | tuple[str, ...]) -> frozenset[str]:
        if models is None:  # the models of the other modules are transformers', targeted by linear layers alone
            return frozenset()
        return frozenset(targeted_layers(models.from_pretrained(model_id), targets))

    return lambda model_id, targets: layers(model_id, targets if isinstance(targets, str) else tuple(targets))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    common = importlib.import_module("tests.testing_common")
    for module in {item.module for item in items}:  # type: ignore[attr-defined]
        take_places(module, common, METHOD)
    kept, left_out = [], []
    for item in items:
        module, test = _name(item)
        rule = scope.rule_for(module, test)
        if rule is None:
            kept.append(item)
        else:
            left_out.append(item)
            recorder_of(config).note_left_out(module, test, rule.reason)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: Any) -> Generator[None, Any, Any]:
    before = _built
    result = yield
    if fixturedef.scope != "function" and _built > before:
        _wide_fixtures.add(fixturedef.argname)
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    item.stash[_BUILT_BEFORE] = _built
    with contextlib.ExitStack() as stack:
        if scope.reloads_onto_new_model(*_name(item)):
            stack.enter_context(equal_toy_models())
        if METHOD.mixed_batches and scope.looks_for_lora(*_name(item)):
            common = importlib.import_module("tests.testing_common")
            stack.enter_context(as_lora(item.module, common, METHOD))  # type: ignore[attr-defined]
        return (yield)


def _name(item: pytest.Item) -> tuple[str, str]:
    """The module and the rest of the test's id, as `scope` names them."""
    path, _, test = item.nodeid.partition("::")
    return path.rpartition("/")[2].removesuffix(".py").removeprefix("test_"), test


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    report = yield
    # A test of another method would pass whatever this package does, so it does not count. Configs in the values of a
    # mark are built during collection.
    parameters = getattr(getattr(item, "callspec", None), "params", {}).values()
    given = any(isinstance(value, METHOD.config_class) for value in parameters)
    shared = _wide_fixtures.intersection(getattr(item, "fixturenames", ()))
    if report.when == "call" and report.passed and _built == item.stash[_BUILT_BEFORE] and not given and not shared:
        report.outcome = "skipped"
        report.longrepr = (str(item.path), 0, f"Skipped: {UNTOUCHED}")
    return report
