"""What `aisp-local --version` says: everything that decides the numbers, without loading any of it."""

from __future__ import annotations

import hashlib
import platform
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import aisp_local
from aisp_local import shipped
from aisp_local.errors import InputError

_DIGITS = 12
_LLAMA_CPP = {"0.3.36": "0c1e57098"}
"""The commit of llama.cpp in a release of the binding, as its changelog says; the library does not know it."""


def lines() -> list[str]:
    """The first one is click's."""
    found = [f"aisp-local, version {aisp_local.__version__}", _binding()]
    if (series := patch_series()) is not None:
        found.append(f"patch series of this checkout: {series}")
    found.append(_first_of("onnxruntime-gpu", "onnxruntime"))
    found.append(f"python {platform.python_version()} on {sys.platform}, numpy {_installed('numpy') or 'missing'}")
    for what, path in (("model", shipped.model), ("reward", shipped.reward)):
        found.append(f"shipped {what}: {_shipped(path)}")
    return found


def _binding() -> str:
    """The version, and the hash of the library, which says which build it is."""
    version = _installed("llama-cpp-python")
    if version is None:
        return "llama-cpp-python missing"
    release, patched, _ = version.partition("+aisp")
    found = [f"llama-cpp-python {version} ({'patched' if patched else 'stock'})"]
    if release in _LLAMA_CPP:
        found.append(f"llama.cpp {_LLAMA_CPP[release]}")
    if (library := _library()) is not None:
        found.append(f"libllama {digest(library)}")
    return ", ".join(found)


def _library() -> Path | None:
    for file in metadata.files("llama-cpp-python") or ():
        if file.name in ("libllama.so", "libllama.dylib", "llama.dll"):
            path = Path(str(file.locate()))
            return path if path.is_file() else None
    return None


def patch_series() -> str | None:
    """How many patches a checkout has and the hash of all; None outside of one."""
    found = sorted((Path(aisp_local.__file__).resolve().parents[1] / "patches" / "series").glob("[0-9]*.patch"))
    if not found:
        return None
    together = hashlib.sha256(b"".join(path.read_bytes() for path in found)).hexdigest()
    return f"{len(found)} patches, {together[:_DIGITS]}"


def _first_of(*names: str) -> str:
    for name in names:
        if (version := _installed(name)) is not None:
            return f"{name} {version}"
    return f"{names[-1]} missing"


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _shipped(find: Callable[[], Path]) -> str:
    try:
        path = find()
    except InputError:
        return "missing"
    file = path / "reward.json" if path.is_dir() else path  # which holds the hashes of the folder's files
    return f"{path.name} {digest(file)}"


def digest(path: Path) -> str:
    """The first digits of a file's sha256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:_DIGITS]
