"""
Runs PEFT's own tests against this package's configs: `python tests/upstream/run.py` (`make test-peft`).

The first run downloads PEFT's tests from PyPI; from then on nothing needs a network.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path


TESTS = Path(__file__).resolve().parents[1]
sys.path[0] = str(TESTS)  # this folder is the package `upstream`
os.environ["HF_HUB_OFFLINE"] = "1"  # before anything of Hugging Face is imported

import transformers  # noqa: E402

from upstream import methods, report, scope  # noqa: E402
from upstream.adapters import write_adapters  # noqa: E402
from upstream.models import write_models  # noqa: E402
from upstream.source import cache_root, fetch_tests  # noqa: E402


# What PEFT's tests import beside what PEFT requires.
REQUIRED = ("datasets", "diffusers", "parameterized", "xdist")


def main() -> int:
    arguments = parse_arguments()
    missing = [f"{'pytest-' if name == 'xdist' else ''}{name}" for name in REQUIRED if find_spec(name) is None]
    if missing:
        sys.exit(f"PEFT's tests need packages that are not installed. Run: pip install {' '.join(missing)}")
    upstream = fetch_tests()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    models = write_models(cache_root())
    runs, status = {}, 0
    for name in arguments.method or methods.METHODS:
        write_adapters(models, methods.METHODS[name])
        with tempfile.TemporaryDirectory() as scratch:
            outcome = Path(scratch) / "report.json"
            run_pytest(name, upstream, models, outcome, arguments)
            if arguments.report and outcome.exists():
                shutil.copy(outcome, arguments.report)
            runs[name], failed = report.summarise(name, outcome)
            status |= failed
    if not all(runs.values()):
        return status
    if not arguments.partial and not arguments.method:
        status |= report.report_stale_rules(runs)
    if arguments.update:
        report.write_page(runs)
        return status
    return status | report.check_page(runs)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", action="append", choices=list(methods.METHODS), help="default: all of them")
    parser.add_argument("--modules", nargs="+", metavar="NAME", help="only these of PEFT's, as in `config other`")
    parser.add_argument("--workers", default="2", help="processes, as for `pytest -n` (default: %(default)s)")
    parser.add_argument("--pytest-args", default="", help="passed on, as in `--pytest-args='-k merge -x'`")
    parser.add_argument("--report", type=Path, metavar="FILE", help="keep the outcome of every test there, as JSON")
    parser.add_argument("--update", action="store_true", help="rewrite NOT_APPLICABLE.md from this run")
    arguments = parser.parse_args()
    arguments.partial = bool(arguments.modules or arguments.pytest_args)
    if arguments.update and (arguments.partial or arguments.method):
        parser.error("--update describes a complete run: leave out --method, --modules and --pytest-args")
    return arguments


def run_pytest(name: str, upstream: Path, models: Path, outcome: Path, arguments: argparse.Namespace) -> None:
    folder = upstream / "tests"
    known = sorted(path.stem.removeprefix("test_") for path in folder.glob("test_*.py"))
    modules = arguments.modules or [module for module in known if module not in scope.MODULES]
    unknown = sorted(set(modules) - set(known))
    if unknown:
        sys.exit(f"PEFT has no test modules {unknown}; it has {known}.")
    command = [
        sys.executable, "-m", "pytest", *(str(folder / f"test_{module}.py") for module in modules),
        # The options of PEFT and of this repository are not for these tests.
        "-c", os.devnull, "--rootdir", str(upstream), "-p", "no:cacheprovider", "-p", "upstream.plugin",
        "-n", arguments.workers, "-q", "--no-header", "--tb", "short", "-W", "ignore", "--disable-warnings",
        *shlex.split(arguments.pytest_args),
    ]  # fmt: skip
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(TESTS), str(upstream), os.environ.get("PYTHONPATH")])),
        "PEFT_EXT_UPSTREAM_METHOD": name,
        "PEFT_EXT_UPSTREAM_REPORT": str(outcome),
        "OMP_NUM_THREADS": "1",  # the models are tiny: threads only wait for each other
        "TOKENIZERS_PARALLELISM": "false",
    }
    # The Hub ids in PEFT's tests are paths in this folder.
    subprocess.run(command, cwd=models, env=environment, check=False)


if __name__ == "__main__":
    sys.exit(main())
