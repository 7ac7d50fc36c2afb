"""Registration: what importing the package changes in PEFT and transformers, how often, and when PEFT has the name."""

import copy
import dataclasses
import importlib
import json
import os
import pickle
import re
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

import peft
import pytest
from peft import PeftConfig, PeftType, get_peft_model
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from transformers import PreTrainedModel

import peft_ext
import peft_ext.tuners.neuroada
from peft_ext.hf.registration import peft_type, register


MEMBER = PeftType["NEUROADA"]


def _tables():
    tables = (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING)
    return [dict(table) for table in tables] + [list(PeftType), len(PeftType)]


def _wrappers():
    model = peft.PeftModel
    methods = [model.from_pretrained.__func__, model.load_adapter, model.save_pretrained]
    return [*methods, PreTrainedModel.save_pretrained, PreTrainedModel.load_adapter]


def test_importing_makes_the_method_known():
    assert PEFT_TYPE_TO_CONFIG_MAPPING[MEMBER] is peft_ext.NeuroAdaConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[MEMBER] is peft_ext.NeuroAdaModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[MEMBER] == "neuroada_" == peft_ext.NeuroAdaModel.prefix
    assert MEMBER not in PEFT_TYPE_TO_MIXED_MODEL_MAPPING


@pytest.mark.parametrize(
    "again",
    [
        lambda: importlib.import_module("peft_ext"),
        lambda: importlib.reload(peft_ext),
        lambda: importlib.reload(peft_ext.tuners.neuroada),
        lambda: register("neuroada", peft_ext.NeuroAdaConfig, peft_ext.NeuroAdaModel),
        lambda: peft_type("NeuroAda"),
    ],
    ids=["import", "reload", "reload of the method", "register", "member"],
)
def test_doing_it_again_changes_nothing(again):
    before, wrapped = _tables(), [method.__wrapped__ for method in _wrappers()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again()
        again()
    assert _tables() == before
    assert [method.__wrapped__ for method in _wrappers()] == wrapped  # not wrapped once more
    assert PeftType["NEUROADA"] is MEMBER


# ------------------------------------------------------------------ a member like the others


@pytest.mark.parametrize("name", ["NEUROADA", "LORA"])
def test_member_behaves_like_peft_s_own(name):
    member = PeftType[name]
    assert PeftType(name) is member is getattr(PeftType, name)
    assert member.name == member.value == name and member == name and hash(member) == hash(name)
    assert isinstance(member, PeftType) and isinstance(member, str)
    assert member in PeftType and member in list(PeftType) and PeftType.__members__[name] is member
    assert str(member) == f"PeftType.{name}" and repr(member) == f"<PeftType.{name}: '{name}'>"
    assert format(member) == format(PeftType.IA3).replace("IA3", name)
    assert json.loads(json.dumps({"type": member})) == {"type": name}
    assert {member: 1}[name] == 1


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_member_is_one_object_after_pickling(protocol):
    assert pickle.loads(pickle.dumps(MEMBER, protocol)) is MEMBER


def test_member_is_one_object_after_copying():
    assert copy.copy(MEMBER) is MEMBER and copy.deepcopy({"type": [MEMBER]})["type"][0] is MEMBER
    config = peft_ext.NeuroAdaConfig()
    assert dataclasses.replace(config).peft_type is MEMBER and dataclasses.asdict(config)["peft_type"] is MEMBER


def test_members_are_still_protected_and_counted():
    assert len(PeftType) == len(list(PeftType)) == len(set(PeftType)) == len(PeftType.__members__)
    with pytest.raises(AttributeError):
        PeftType.NEUROADA = "other"
    with pytest.raises(ValueError, match="is not a valid PeftType"):
        PeftType("NEUROADAM")


@pytest.mark.parametrize("name", ["NEUROADA", MEMBER, "LORA", PeftType.LORA], ids=repr)
def test_types_make_configs_without_arguments(name):
    config = PeftConfig.from_peft_type(peft_type=name)
    assert config.peft_type == name and config == type(config)()


# ------------------------------------------------------------------ PEFT has a method of this name


@pytest.fixture
def foreign():
    """A method named `somebody`, as if PEFT had it: its config and model classes come from elsewhere."""
    member = peft_type("somebody")

    class SomebodyConfig(PeftConfig):
        __module__ = "peft.tuners.somebody"

    class SomebodyModel:
        __module__ = "peft.tuners.somebody"

    PEFT_TYPE_TO_CONFIG_MAPPING[member] = SomebodyConfig
    PEFT_TYPE_TO_TUNER_MAPPING[member] = SomebodyModel
    PEFT_TYPE_TO_PREFIX_MAPPING[member] = "somebody_"
    yield member, SomebodyConfig, SomebodyModel
    for table in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
        del table[member]
    PeftType._member_names_.remove("SOMEBODY")
    for table in (PeftType._member_map_, PeftType._value2member_map_):
        del table["SOMEBODY"]
    type.__delattr__(PeftType, "SOMEBODY")


def test_method_of_peft_s_own_wins_with_a_warning(foreign):
    member, config_cls, model_cls = foreign
    before = _tables()
    with pytest.warns(UserWarning, match=r"PEFT has a method named SOMEBODY of its own \(peft\.tuners\.somebody\."):
        assert register("somebody", peft_ext.NeuroAdaConfig, peft_ext.NeuroAdaModel) is False
    assert _tables() == before
    assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is config_cls and PEFT_TYPE_TO_TUNER_MAPPING[member] is model_cls


# ------------------------------------------------------------------ what a saved folder says


@pytest.fixture
def folder(llama, tmp_path):
    get_peft_model(llama, peft_ext.NeuroAdaConfig(k=1, task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    return tmp_path


def test_folder_says_which_package_loads_it(folder):
    readme = (folder / "README.md").read_text()
    assert "KeyError: 'NEUROADA'" in readme  # found by a search for what the user sees
    requires = json.loads((folder / "adapter_config.json").read_text())["requires"]
    for text in (readme, requires):
        assert "pip install peft-ext" in text and "import peft_ext" in text


# In another interpreter: without the import, with it as the README prints it, and after importing every file anew.
STORY = """
import importlib, sys, warnings
sys.path[:0] = {packages!r}
import torch
from peft import PeftConfig, PeftType, get_peft_model, mapping
from transformers import AutoModelForCausalLM
try:
    PeftConfig.from_pretrained({folder!r})
except KeyError as error:
    print("KeyError", error)

base_model = AutoModelForCausalLM.from_pretrained({base!r})
{snippet}
print(model.active_peft_config.peft_type.value)

warnings.simplefilter("error", UserWarning)
members = list(PeftType)
for name in [name for name in sys.modules if name.split(".")[0] == "peft_ext"]:
    del sys.modules[name]
second = importlib.import_module("peft_ext")
assert second is not peft_ext and second.NeuroAdaConfig is not peft_ext.NeuroAdaConfig
assert list(PeftType) == members
assert mapping.PEFT_TYPE_TO_CONFIG_MAPPING["NEUROADA"] is second.NeuroAdaConfig
assert mapping.PEFT_TYPE_TO_TUNER_MAPPING["NEUROADA"] is second.NeuroAdaModel
model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(3, 2)), second.NeuroAdaConfig(target_modules=["0"]))
print(tuple(model(torch.ones(1, 3)).shape))
"""


def test_key_error_then_the_readme_s_snippet_then_every_file_anew(llama, folder):
    readme = (folder / "README.md").read_text()
    snippet = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)[-1]
    packages = [str(Path(peft_ext.__file__).parents[1]), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    code = STORY.format(packages=packages, folder=str(folder), base=llama.name_or_path, snippet=snippet)
    # `-S`: no `.pth` files, so that a developer's own auto-import takes no part.
    command = [sys.executable, "-S", "-c", code]
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env, cwd=folder.parent)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["KeyError 'NEUROADA'", "NEUROADA", "(1, 2)"]
