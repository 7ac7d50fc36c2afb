"""Let PEFT find our methods without `import peft_ext`.

    python -m peft_ext.autoload --enable | --disable | --status

An adapter that names a method of ours cannot be loaded in a program that never imports `peft_ext`: PEFT raises a bare
`KeyError: 'NEUROADA'`. After `--enable`, every program of this environment that imports `peft` imports `peft_ext`
right after it, so that `PeftModel.from_pretrained`, `AutoPeftModel*`, `AutoModel*.from_pretrained(adapter)` and
command lines such as `trl sft` work as they are. Programs that do not import `peft` read two small files at start.
"""

from __future__ import annotations

import argparse
import sysconfig
from importlib import resources
from pathlib import Path

from ..io import write_atomically


HOOK_FILE = "_peft_ext_autoload.py"
PTH_FILE = "peft_ext_autoload.pth"
PTH_LINE = "import _peft_ext_autoload\n"


def default_site_dir() -> Path:
    """The site-packages folder of the running interpreter's environment."""
    return Path(sysconfig.get_path("purelib"))


def enable(site_dir: Path) -> None:
    """Write the hook and the `.pth` file that imports it at start into `site_dir`, or bring them up to date.

    The hook comes first: an interpreter that starts in between must not meet a `.pth` file that imports nothing.
    """
    write_atomically(str(site_dir / HOOK_FILE), _hook_source())
    write_atomically(str(site_dir / PTH_FILE), PTH_LINE)


def disable(site_dir: Path) -> None:
    """Remove from `site_dir` whatever `enable` and later interpreter starts left there."""
    for path in (site_dir / PTH_FILE, site_dir / HOOK_FILE):
        path.unlink(missing_ok=True)
    for path in (site_dir / "__pycache__").glob(f"{Path(HOOK_FILE).stem}.*.pyc"):
        path.unlink(missing_ok=True)


def status(site_dir: Path) -> str:
    """`"enabled"`, `"disabled"`, or `"outdated"`: another version of peft_ext wrote the files, or one is missing."""
    hook, pth = site_dir / HOOK_FILE, site_dir / PTH_FILE
    if not hook.exists() and not pth.exists():
        return "disabled"
    current = hook.exists() and pth.exists() and hook.read_text() == _hook_source() and pth.read_text() == PTH_LINE
    return "enabled" if current else "outdated"


def _hook_source() -> str:
    return resources.files("peft_ext.install").joinpath("autoload_hook.py").read_text(encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m peft_ext.autoload",
        description="Import peft_ext right after peft in every program of this environment; PEFT then knows NEUROADA.",
    )
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--enable", action="store_true", help="switch it on, or bring it up to date")
    action.add_argument("--disable", action="store_true", help="switch it off and remove its files")
    action.add_argument("--status", action="store_true", help="say whether it is on")
    parser.add_argument(
        "--site-dir",
        type=Path,
        default=default_site_dir(),
        metavar="DIR",
        help="site-packages folder (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    site_dir: Path = options.site_dir
    if not site_dir.is_dir():
        parser.exit(1, f"--site-dir {site_dir} is not a folder; give an existing site-packages folder\n")
    try:
        if options.enable:
            enable(site_dir)
        elif options.disable:
            disable(site_dir)
    except OSError as error:
        parser.exit(
            1,
            f"cannot change {site_dir}: {error}. Run this in a virtual environment or with the right to write there, "
            'or name a folder of yours: --site-dir "$(python -m site --user-site)"\n',
        )
    state = status(site_dir)
    print(f"autoload of peft_ext: {state} ({site_dir / PTH_FILE})")
    if state == "outdated":
        print("bring it up to date with: python -m peft_ext.autoload --enable")


if __name__ == "__main__":
    main()
