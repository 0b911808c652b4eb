"""The pinned sdist: find or download it, check it, unpack it."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path

from aisp_build.errors import BuildError


@dataclass(frozen=True)
class Pin:
    """One release, exactly."""

    name: str
    version: str
    sha256: str
    local: str

    @property
    def sdist(self) -> str:
        return f"{self.name.replace('-', '_')}-{self.version}.tar.gz"


def read_pin(path: Path) -> Pin:
    return Pin(**tomllib.loads(path.read_text(encoding="utf-8")))


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(pin: Pin, folder: Path, local: str | list[str] | None = None) -> Path:
    """The verified sdist: the local one if given, else from ``folder``, else downloaded into it by pip."""
    if local:
        path = Path(str(local)).expanduser()
        if not path.is_file():
            raise BuildError(f"the local sdist {path} does not exist; check AISP_LLAMA_SDIST")
        _check(path, pin, "give the sdist of exactly this release")
        return path
    path = folder / pin.sdist
    if path.is_file() and sha256(path) == pin.sha256:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        download(pin, work)
        found = Path(work) / pin.sdist
        if not found.is_file():
            raise BuildError(f"the package index gave no {pin.sdist}; check pip's configuration")
        _check(found, pin, "the package index serves another file: use a trusted index")
        os.replace(found, path)
    return path


def _check(path: Path, pin: Pin, advice: str) -> None:
    found = sha256(path)
    if found != pin.sha256:
        raise BuildError(f"{path} has the sha256 {found[:16]}..., not {pin.sha256[:16]}...; {advice}")


def download(pin: Pin, folder: str) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--no-binary", ":all:", "-d", folder]
    command += [f"{pin.name}=={pin.version}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
        raise BuildError(
            f"{pin.name} {pin.version} could not be downloaded ({lines[-1] if lines else 'pip failed'}); "
            "check the network, or set AISP_LLAMA_SDIST to the sdist's path"
        )


def unpack(sdist: Path, folder: Path) -> Path:
    """Unpack safely; the tree's top folder."""
    try:
        with tarfile.open(sdist) as archive:
            _extract(archive, folder)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise BuildError(f"{sdist} cannot be unpacked ({error}); download it again") from error
    trees = [path for path in folder.iterdir() if path.is_dir()]
    if len(trees) != 1:
        raise BuildError(f"{sdist} does not hold one top folder; it is not an sdist")
    # A left-over .git would make tools look for a repository that is not there.
    for left in trees[0].rglob(".git"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    return trees[0]


def _extract(archive: tarfile.TarFile, folder: Path) -> None:
    if hasattr(tarfile, "data_filter"):
        archive.extractall(folder, filter="data")
        return
    # Python 3.11.0 to 3.11.3 have no filter (Debian 12 has 3.11.2); an sdist needs files and folders only.
    root = folder.resolve()
    for member in archive.getmembers():
        inside = (root / member.name).resolve().is_relative_to(root)
        if not inside or not (member.isfile() or member.isdir()):
            raise tarfile.TarError(f"{member.name!r} leaves the folder or is no plain file")
    archive.extractall(folder)


def set_version(tree: Path, pin: Pin) -> None:
    """Mark the version as ours: 0.3.36 becomes 0.3.36+aisp.1."""
    path = tree / "llama_cpp" / "__init__.py"
    text = path.read_text(encoding="utf-8")
    changed = text.replace(f'"{pin.version}"', f'"{pin.version}+{pin.local}"')
    if changed == text:
        raise BuildError(f"{path.name} does not hold the version {pin.version}; the pin is out of date")
    path.write_text(changed, encoding="utf-8")
