"""The benchmarks' command lines: what can't be measured or written is refused by a message, before any work."""

import importlib
import json
import sys
from pathlib import Path

import pytest


BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"
# Each script, and a function of its that measuring would start with.
SCRIPTS = {
    "step": "gate",
    "convert": "llama",
    "steering": "check_steering",
    "selection": "build",
    "mtl": "run_apart",
    "flow": "measure",
    "crossover": "measure",
    "ops": "seconds",
}
COUNTS = {
    "step": ["steps", "warmup", "threads", "layer", "tokens", "batch", "hidden", "heads", "kv-heads", "layers"],
    "convert": ["steps", "warmup", "threads", "tokens", "heads", "vocab"],
    "steering": ["steps", "warmup", "threads", "side", "text-tokens", "vocab"],
    "selection": ["rounds", "threads", "batch", "batches", "image", "layers"],
    "mtl": ["tasks", "batch", "steps"],
    "flow": ["rounds", "threads", "width", "vision-layers", "window"],
    "crossover": ["passes", "rounds", "threads"],
    "ops": ["tokens", "k", "rounds", "threads", "working-set"],
}


@pytest.fixture
def refused(monkeypatch, capsys):
    """Function: script and arguments to the message that it ends with."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def run(script, *arguments):
        module = importlib.import_module(script)
        monkeypatch.setattr(module, SCRIPTS[script], None)  # to call it is a TypeError
        with pytest.raises(SystemExit) as stop:
            module.main(list(arguments))
        assert stop.value.code == 2
        return capsys.readouterr().err

    yield run
    for name in [name for name in sys.modules if name in SCRIPTS or name.partition(".")[0] == "_common"]:
        del sys.modules[name]


@pytest.mark.parametrize("value", ["0", "-3", "many"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_counts(refused, script, value):
    for name in COUNTS[script]:
        error = refused(script, f"--{name}", value)
        assert f"argument --{name}: '{value}' is not a whole number of at least" in error and "pass one" in error


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("where", ["a folder", "below a file"])
def test_files_that_cannot_be_written(refused, tmp_path, script, where):
    (tmp_path / "file").write_text("mine")
    path = tmp_path if where == "a folder" else tmp_path / "file" / "deeper" / "out.json"
    assert f"argument --out: '{path}'" in refused(script, "--out", str(path))
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_folders_without_permission(refused, monkeypatch, tmp_path):
    def denied(**where):
        raise PermissionError(13, "Permission denied")  # root, as which tests may run, is not denied anything

    monkeypatch.setattr("tempfile.TemporaryFile", denied)
    error = refused("step", "--out", str(tmp_path / "out.json"))
    assert f"nothing can be written in '{tmp_path}' (Permission denied): pass a file elsewhere" in error


@pytest.mark.parametrize("script", ["step", "convert", "steering", "selection", "crossover", "ops"])
@pytest.mark.parametrize(
    ("device", "devices", "reason"),
    [
        ("cuda", 0, "of which torch sees none: pass cpu"),
        ("cuda:2", 2, "pass cuda:<n> below 2"),
        ("gpu", 2, "is no device: pass cpu, cuda"),
        ("meta", 2, "is no device: pass cpu, cuda"),
    ],
)
def test_devices(refused, monkeypatch, script, device, devices, reason):
    monkeypatch.setattr("torch.cuda.is_available", lambda: devices > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: devices)
    error = refused(script, "--device", device)
    assert f"argument --device: '{device}'" in error and reason in error


@pytest.mark.parametrize(
    ("script", "arguments", "reason"),
    [
        ("step", ["--heads", "3"], "`heads` (3) of an even width"),
        ("step", ["--kv-heads", "3"], "multiple of `kv_heads` (3)"),
        ("step", ["--methods", "neuroada-k0"], "'neuroada-k0', which is no method"),
        ("step", ["--methods", "neuroada-k1@fast"], "backend='fast'"),
        ("step", ["--solo", "fulll"], "'fulll', which is no method"),
        ("convert", ["--heads", "3"], "`heads` (3) of an even width"),
        ("convert", ["--peers", "lora-r8"], "'lora-r8': use shira-k<k> or supertuning-k<k>"),
        ("steering", ["--heads", "3"], "`heads` (3) of an even width"),
        ("steering", ["--methods", "mores-r0"], "'mores-r0': use frozen"),
        ("steering", ["--methods", "mores-r8@200"], "token_ratio=2.0"),
        ("selection", ["--hidden", "100"], "--hidden 100 is no multiple of 64"),
        ("selection", ["--image", "100"], "--image 100 is no multiple of 16"),
        ("flow", ["--width", "24"], "--width 24 must split into 8 heads"),
        ("crossover", ["--points", "5"], "--points: '5' is not FROM:TO within 0:100"),
        ("crossover", ["--points", "x:"], "--points: 'x:' is not FROM:TO within 0:100"),
        ("crossover", ["--points", "9:9"], "--points: '9:9' is not FROM:TO within 0:100"),
        ("crossover", ["--points", "0:101"], "--points: '0:101' is not FROM:TO within 0:100"),
        ("crossover", ["--seconds", "-1"], "--seconds: '-1' is no number of seconds"),
        ("crossover", ["--report"], "--report prints what a file holds: name it by --out"),
        ("crossover", ["--report", "--out", "nowhere.json"], "--out nowhere.json does not exist"),
    ],
)
def test_sizes_and_methods(refused, script, arguments, reason):
    assert reason in refused(script, *arguments)


POINT = {"rows": 256, "fan_in": 256, "k": 1, "tokens": 1, "passes": 1}
TIMES = {"bypass": 1.0, "folded": 2.0, "dense": 3.0}


@pytest.mark.parametrize(
    ("arguments", "change", "reason"),
    [
        ([], {"dtype": "bfloat16"}, "results of another kind (dtype bfloat16, uneven False, device cpu, threads 2)"),
        (["--uneven"], {}, "results of another kind"),
        (["--threads", "1"], {}, "results of another kind"),
        ([], {"environment": {"accelerator": "a GPU", "threads": 2}}, "device cuda): name another file"),
        (["--report"], {"environment": {"accelerator": "a GPU", "threads": 2}}, "device cuda): name another file"),
        (["--report"], {"results": []}, "holds no point of the grid"),
        (["--report"], {"results": [{**POINT, "rows": 7, "seconds": TIMES}]}, "holds no point of the grid"),
        (["--report"], {"results": [POINT]}, "holds no results of this script"),
        (["--report"], {"results": [{**POINT, "seconds": {"dense": 1.0}}]}, "holds no results of this script"),
    ],
)
def test_results_of_another_run_that_crossovers_are_not_joined_with(refused, tmp_path, arguments, change, reason):
    out = tmp_path / "grid.json"
    environment = {"accelerator": None, "threads": 2}
    results = [{**POINT, "seconds": TIMES}]
    report = {"environment": environment, "dtype": "float32", "uneven": False, "results": results, **change}
    out.write_text(json.dumps(report))
    assert reason in refused("crossover", *arguments, "--out", str(out))
    assert json.loads(out.read_text()) == report


def test_reports_appear_whole_in_new_folders(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    write_report = importlib.import_module("_common.report").write_report
    path = tmp_path / "new" / "folder" / "out.json"
    write_report(path, {"name": "β"})
    with pytest.raises(TypeError):
        write_report(path, {"name": object()})
    monkeypatch.setattr("os.replace", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        write_report(path, {"name": "half"})
    assert json.loads(path.read_text()) == {"name": "β"} and list(path.parent.iterdir()) == [path]
    for name in [name for name in sys.modules if name.partition(".")[0] == "_common"]:
        del sys.modules[name]
