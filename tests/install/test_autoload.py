"""The opt-in import of peft_ext after peft, in throw-away site folders: the environment of the tests is not touched.

Interpreters start with `-S`, so no `.pth` file of the developer's own environment takes part. The rules of the hook
are tested on stand-ins for `peft` and `peft_ext`, which start in hundredths of a second; registration on the real.
"""

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import peft_ext
from peft_ext.install import autoload


PACKAGES = [str(Path(peft_ext.__file__).parents[1]), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]


@pytest.fixture
def site_dir(tmp_path):
    folder = tmp_path / "site"
    folder.mkdir()
    return folder


@pytest.fixture
def stand_ins(tmp_path):
    """A folder with a `peft` and a `peft_ext` that note in `sys.imported` when they were executed."""
    for name in ("peft", "peft_ext"):
        _write_package(tmp_path / "stand_ins", name, "")
    return tmp_path / "stand_ins"


def _write_package(folder, name, body):
    package = folder / name
    package.mkdir(parents=True, exist_ok=True)
    note = f"import sys\nsys.imported = [*getattr(sys, 'imported', []), {name!r}]\n"
    (package / "__init__.py").write_text(f"{body}\n{note}")


def _run(code, site_dir, *paths, options=(), env=None):
    """Run `code` in a new interpreter that knows `paths` and has processed the `.pth` files of `site_dir`."""
    start = f"import site, sys; sys.path[:0] = {[str(path) for path in paths]}; site.addsitedir({str(site_dir)!r})\n"
    command = [sys.executable, "-S", *options, "-c", start + code]
    # Not the current folder: Python would find the peft_ext of a checkout in it.
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=site_dir, env={**os.environ, **(env or {})}
    )


# What bitsandbytes and torchao, which `import peft` imports where they are installed, say on a machine without a GPU.
OF_QUANTISERS = re.compile(r"Failed to load (CPU gemm_4bit_forward|\S*torchao)|.*_pytree\.py:\d+\] <enum ")


def _output(*arguments, **keywords):
    result = _run(*arguments, **keywords)
    assert result.returncode == 0, result.stderr
    assert [line for line in result.stderr.splitlines() if not OF_QUANTISERS.match(line)] == []
    return result.stdout.split()


IMPORTED = "import peft; print(*sys.imported)"


def test_peft_alone_does_not_import_peft_ext(site_dir, stand_ins):
    assert _output(IMPORTED, site_dir, stand_ins) == ["peft"]


def test_enabled_peft_ext_comes_right_after_peft(site_dir, stand_ins):
    autoload.enable(site_dir)
    assert _output(IMPORTED, site_dir, stand_ins) == ["peft", "peft_ext"]


def test_asking_whether_peft_exists_imports_nothing_and_loses_nothing(site_dir, stand_ins):
    autoload.enable(site_dir)
    code = "import importlib.util; importlib.util.find_spec('peft'); print({'peft', 'peft_ext'} & set(sys.modules))\n"
    assert _output(code + IMPORTED, site_dir, stand_ins) == ["set()", "peft", "peft_ext"]


def test_submodule_of_peft_imported_first(site_dir, stand_ins):
    autoload.enable(site_dir)
    (stand_ins / "peft" / "tuners.py").touch()
    assert _output("import peft.tuners; print(*sys.imported)", site_dir, stand_ins) == ["peft", "peft_ext"]


def test_peft_ext_that_imports_peft_itself_runs_once(site_dir, stand_ins):
    autoload.enable(site_dir)
    _write_package(stand_ins, "peft_ext", "import peft")
    assert _output("import peft_ext; print(*sys.imported)", site_dir, stand_ins) == ["peft", "peft_ext"]
    assert _output(IMPORTED, site_dir, stand_ins) == ["peft", "peft_ext"]


def test_a_failed_import_of_peft_can_be_repeated(site_dir, stand_ins):
    autoload.enable(site_dir)
    _write_package(stand_ins, "peft", "import sys\nif not hasattr(sys, 'second'):\n    raise ImportError('first')")
    code = "try:\n    import peft\nexcept ImportError as error:\n    print(error)\nsys.second = True\n"
    assert _output(code + IMPORTED, site_dir, stand_ins) == ["first", "peft", "peft_ext"]


def test_hook_leaves_no_trace_once_peft_is_imported(site_dir, stand_ins):
    state = "import peft; print(len(sys.meta_path), type(peft.__loader__).__name__, *vars(peft.__loader__))"
    before = _output(state, site_dir, stand_ins)
    autoload.enable(site_dir)
    assert _output(state, site_dir, stand_ins) == before


def test_two_delegating_finders_do_not_call_each_other_for_ever(site_dir, stand_ins):
    autoload.enable(site_dir)
    other = """
class Other:
    def find_spec(self, name, path=None, target=None):
        specs = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        return next(filter(None, specs), None)
sys.meta_path.insert(0, Other())
"""
    assert _output(other + IMPORTED, site_dir, stand_ins) == ["peft", "peft_ext"]


@pytest.mark.parametrize("options", [(), ("-W", "error")], ids=["warnings", "warnings-are-errors"])
@pytest.mark.parametrize("body", ["raise RuntimeError('broken')", "import missing_dependency", "1 +"])
def test_broken_peft_ext_does_not_break_peft(site_dir, stand_ins, body, options):
    autoload.enable(site_dir)
    _write_package(stand_ins, "peft_ext", body)
    result = _run(IMPORTED, site_dir, stand_ins, options=options)
    assert (result.returncode, result.stdout.split()) == (0, ["peft"]), result.stderr
    assert "peft_ext could not be imported" in result.stderr
    assert str(site_dir) in result.stderr  # where to switch it off when `python -m peft_ext.autoload` does not run


def test_files_left_behind_by_an_uninstalled_peft_ext_are_silent(site_dir, stand_ins):
    autoload.enable(site_dir)
    (stand_ins / "peft_ext" / "__init__.py").unlink()
    (stand_ins / "peft_ext").rmdir()
    assert _output(IMPORTED, site_dir, stand_ins) == ["peft"]


def test_programs_without_peft_pay_for_no_further_module(site_dir):
    modules = "print(*sorted(sys.modules))"
    before = set(_output(modules, site_dir, *PACKAGES))
    autoload.enable(site_dir)
    assert set(_output(modules, site_dir, *PACKAGES)) - before == {"_peft_ext_autoload", "__future__"}


def test_enable_and_disable_are_idempotent_and_leave_nothing(site_dir, stand_ins):
    for _ in range(2):
        autoload.enable(site_dir)
    assert sorted(path.name for path in site_dir.iterdir()) == [autoload.HOOK_FILE, autoload.PTH_FILE]
    assert autoload.status(site_dir) == "enabled"
    _output(IMPORTED, site_dir, stand_ins, env={"PYTHONDONTWRITEBYTECODE": ""})
    assert list(site_dir.rglob("*.pyc"))
    for _ in range(2):
        autoload.disable(site_dir)
    assert not [path for path in site_dir.rglob("*") if path.is_file()]
    assert autoload.status(site_dir) == "disabled"
    assert _output(IMPORTED, site_dir, stand_ins) == ["peft"]


@pytest.mark.parametrize("name", [autoload.HOOK_FILE, autoload.PTH_FILE])
def test_files_of_another_version_are_outdated_until_enabled_again(site_dir, name):
    autoload.enable(site_dir)
    (site_dir / name).write_text("# an older one\n")
    assert autoload.status(site_dir) == "outdated"
    autoload.enable(site_dir)
    assert autoload.status(site_dir) == "enabled"


def test_files_can_be_read_by_every_user(site_dir):
    mask = os.umask(0o022)
    try:
        autoload.enable(site_dir)
    finally:
        os.umask(mask)
    assert {path.stat().st_mode & 0o777 for path in site_dir.iterdir()} == {0o644}


def test_folder_without_the_right_to_write_names_the_remedy(site_dir, monkeypatch, capsys):
    def refuse(source, target):
        raise PermissionError(13, "Permission denied", str(target))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(SystemExit) as exit_info:
        autoload.main(["--enable", "--site-dir", str(site_dir)])
    assert exit_info.value.code == 1
    assert "virtual environment" in capsys.readouterr().err
    assert not list(site_dir.iterdir())


def test_missing_folder_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_info:
        autoload.main(["--enable", "--site-dir", str(tmp_path / "nowhere")])
    assert exit_info.value.code == 1
    assert str(tmp_path / "nowhere") in capsys.readouterr().err


def test_command_line_reports_the_state(site_dir, capsys):
    states = []
    for action in ("--status", "--enable", "--status", "--disable", "--status"):
        autoload.main([action, "--site-dir", str(site_dir)])
        states.append(capsys.readouterr().out.split()[3])
    assert states == ["disabled", "enabled", "enabled", "disabled", "disabled"]


def test_importing_the_real_peft_ext_first_works(site_dir):
    autoload.enable(site_dir)
    code = "import peft_ext, peft; print(peft.PeftType.NEUROADA.value, peft_ext.NeuroAdaConfig().peft_type.value)"
    assert _output(code, site_dir, *PACKAGES) == ["NEUROADA", "NEUROADA"]


@pytest.mark.slow
def test_adapters_load_through_every_route_without_the_import(site_dir, tmp_path):
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    LlamaForCausalLM(config).save_pretrained(base)
    model = LlamaForCausalLM.from_pretrained(base)
    get_peft_model(model, peft_ext.NeuroAdaConfig(k=1, task_type="CAUSAL_LM")).save_pretrained(adapter)

    routes = f"""
from transformers import AutoModelForCausalLM
adapter, base = {str(adapter)!r}, {str(base)!r}
models = [AutoModelForCausalLM.from_pretrained(adapter)]
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
models += [PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)]
models += [AutoPeftModelForCausalLM.from_pretrained(adapter)]
models += [AutoModelForCausalLM.from_pretrained(base)]
models[-1].load_adapter(adapter)
print(*[any("neuroada_" in name for name, _ in model.named_parameters()) for model in models])
print(PeftConfig.from_pretrained(adapter).peft_type.value)
"""
    autoload.enable(site_dir)
    result = _run(routes, site_dir, *PACKAGES)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["True"] * 4 + ["NEUROADA"]
