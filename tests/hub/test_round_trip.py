"""To the Hub and back, against a server on this machine: create, upload, download, load in a fresh process."""

import json
import os
import subprocess
import sys

import pytest

from tests.hub._server import Hub


PUSH = """
import sys, torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM
import peft_ext
torch.manual_seed(0)
config = peft_ext.NeuroAdaConfig(k=2, init_weights=False)
model = get_peft_model(AutoModelForCausalLM.from_pretrained(sys.argv[1]), config).eval()
for _ in range(2):
    try:
        model.push_to_hub("me/adapter")
        print("pushed", model(torch.arange(3, 9)[None]).logits.sum().item(), flush=True)
    except Exception as error:
        print("refused", type(error).__name__, flush=True)
        input()  # the server works again
"""

LOAD = """
import sys, tempfile, torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM
import peft_ext
base = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
before = {name: id(module) for name, module in base.named_modules()}
for number, cache in enumerate(sys.argv[2:]):
    if number:
        input()  # the server is told what goes wrong
    try:
        model = PeftModel.from_pretrained(base, "me/adapter", cache_dir=cache).eval()
        print("loaded", model(torch.arange(3, 9)[None]).logits.sum().item(), flush=True)
        base = model.unload()
    except Exception as error:
        same = {name: id(module) for name, module in base.named_modules()} == before
        text = str(error).replace(chr(10), " ")
        print("refused", type(error).__name__, text, "untouched" if same else "touched", flush=True)
"""


@pytest.fixture
def hub():
    with Hub() as server:
        yield server


def started(code, hub, home, *arguments):
    names = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_none", "HF_HOME": str(home)}
    env = {**os.environ, **names, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(
        command, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def said(process):
    for line in process.stdout:
        if line.startswith(("pushed", "loaded", "refused")):
            return line.split()
    raise AssertionError(process.stderr.read())


def told(process):
    """What it says after it was told to go on."""
    process.stdin.write("\n")
    process.stdin.flush()
    return said(process)


@pytest.mark.slow
def test_round_trip(hub, model_dir, tmp_path):
    base = model_dir("llama")
    hub.faults = {"upload"}
    pushing = started(PUSH, hub, tmp_path / "home", base)
    assert said(pushing)[0] == "refused"
    assert not any(name.startswith("adapter") for name in hub.files["me/adapter"])

    hub.faults = set()
    pushed = told(pushing)
    pushing.kill()
    assert pushed[0] == "pushed"
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= hub.files["me/adapter"].keys()
    assert json.loads(hub.files["me/adapter"]["adapter_config.json"])["k"] == 2
    card = hub.files["me/adapter"]["README.md"].decode()
    assert 'PeftModel.from_pretrained(base_model, "me/adapter")' in card and "More Information Needed" not in card

    caches = [tmp_path / name for name in ("good", "flipped", "cut", "good again")]
    fresh = started(LOAD, hub, tmp_path / "other home", base, *caches)
    loaded = said(fresh)
    assert loaded[0] == "loaded" and float(loaded[1]) == pytest.approx(float(pushed[1]), rel=1e-4)
    for faults, wanted in (({"flip"}, "checksum"), ({"cut"}, "refused"), (set(), "loaded")):
        hub.faults = faults
        line = told(fresh)
        assert wanted in line, line
        if faults:
            assert line[0] == "refused" and line[-1] == "untouched", line
    fresh.communicate()
