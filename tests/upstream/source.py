"""PEFT's tests, taken from the source distribution that matches the installed release.

Nothing of them enters this repository: they are unpacked into a cache folder and read from there.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path, PurePosixPath


def cache_root() -> Path:
    """The folder that holds downloads and generated models, outside of the repository."""
    configured = os.environ.get("PEFT_EXT_CACHE")
    root = Path(configured).expanduser() if configured else Path.home() / ".cache" / "peft_ext"
    return root.resolve() / "upstream"


def fetch_tests() -> Path:
    """Returns a folder with PEFT's `tests` as an importable package, downloading it on first use."""
    release = version("peft")
    home = cache_root() / f"peft-{release}"
    if not (home / "tests" / "__init__.py").exists():
        with tempfile.TemporaryDirectory() as scratch:
            _unpack_tests(_download(release, Path(scratch)), home)
        # The distribution leaves these two out. The tests import each other relatively, so they must be a package; the
        # empty file is written last and marks the folder as complete.
        (home / "tests" / "__init__.py").touch()
    return home


def _download(release: str, folder: Path) -> Path:
    # pip asks the build backend for the metadata of a source distribution. With build isolation it would fetch
    # setuptools for that, without it the one at hand is used, which a fresh virtual environment may lack: try both.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "peft"]
    for options in ([], ["--no-build-isolation"]):
        target = ["--dest", str(folder), f"peft=={release}"]
        done = subprocess.run([*command, *options, *target], capture_output=True, text=True)
        archives = sorted(folder.glob("peft-*.tar.gz"))
        if archives:
            return archives[0]
    raise SystemExit(
        f"Could not download the source distribution of peft {release}, which holds PEFT's tests. A development "
        f"version of PEFT has none: install a release from PyPI. pip said:\n{done.stderr.strip()}"
    )


def _unpack_tests(archive: Path, home: Path) -> None:
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            parts = PurePosixPath(member.name).parts[1:]  # drop "peft-<release>/"
            if member.isfile() and parts[:1] == ("tests",) and ".." not in parts:
                target = home.joinpath(*parts)
                target.parent.mkdir(parents=True, exist_ok=True)
                content = tar.extractfile(member)
                assert content is not None  # a regular file, checked above
                target.write_bytes(content.read())
