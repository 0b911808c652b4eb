"""Built wheels, kept under a hash of everything that determines them."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aisp_build.errors import BuildError

_ENVIRONMENT = ("CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS", "CUDACXX", "CUDAARCHS", "FORCE_CMAKE")
_PREFIXES = ("CMAKE_", "SKBUILD_", "GGML_", "LLAMA_")
_NO_PART = {"CMAKE_BUILD_PARALLEL_LEVEL"}  # how fast, not what


def folder() -> Path:
    """The user's cache folder of aisp-local."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or str(Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = str(Path.home() / "Library" / "Caches")
    else:
        base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "aisp-local"


def compiler() -> str | None:
    """The C++ compiler that CMake will choose, as a command; None if there is none."""
    for name in (os.environ.get("CXX", "").split(" ")[0], "c++", "g++", "clang++", "cl"):
        found = shutil.which(name) if name else None
        if found:
            return found
        if name and name == os.environ.get("CXX"):
            return None
    return None


def require_compiler() -> None:
    """Raises BuildError without a C++ compiler."""
    if compiler() is None:
        named = os.environ.get("CXX")
        what = f"the compiler CXX={named} was not found" if named else "no C++ compiler was found"
        raise BuildError(
            f"{what}; install one (Debian: apt install g++; macOS: xcode-select --install; "
            "Windows: Visual Studio Build Tools)"
        )


def _compiler_version() -> str:
    command = compiler()
    if command is None:
        return "none"
    result = subprocess.run([command, "--version"], capture_output=True, text=True, check=False)
    return f"{command} {result.stdout or result.stderr}"


def _cpu() -> str:
    """What -march=native depends on."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith(("flags", "Features")):
                    return " ".join(sorted(line.split(":", 1)[1].split()))
    except OSError:
        pass
    return platform.processor()


def wheel_key(patches: Path, sdist_sha256: str, settings: Mapping[str, Any]) -> str:
    """The hash under which a wheel is kept."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if (name in _ENVIRONMENT or name.startswith(_PREFIXES)) and name not in _NO_PART
    }
    native = "GGML_NATIVE=OFF" not in os.environ.get("CMAKE_ARGS", "").replace(":BOOL", "").upper()
    sources = sorted([*patches.glob("series/*.patch"), *patches.glob("*.toml"), *patches.rglob("*.py")])
    parts = {
        "sdist": sdist_sha256,
        "sources": [
            [path.relative_to(patches).as_posix(), hashlib.sha256(path.read_bytes()).hexdigest()] for path in sources
        ],
        "environment": environment,
        "settings": dict(settings),
        "python": [sys.implementation.cache_tag, sysconfig.get_platform()],
        "libc": list(platform.libc_ver()),
        "compiler": _compiler_version(),
        "cpu": _cpu() if native else "",
    }
    data = json.dumps(parts, sort_keys=True).encode()
    return hashlib.sha256(data).hexdigest()[:32]


@contextmanager
def lock(store: Path, *, timeout: float = 3600.0) -> Iterator[None]:
    """One build of a key at a time; the others wait, then find it in the cache."""
    path = store.with_suffix(".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b")
    except OSError as error:
        raise BuildError(f"the cache {path.parent} cannot be written ({error}); set XDG_CACHE_HOME") from error
    deadline = time.monotonic() + timeout
    with file:
        while not _try_lock(file.fileno()):
            if time.monotonic() > deadline:
                raise BuildError(f"another build holds {path}; wait for it to end")
            time.sleep(0.5)
        yield


def _try_lock(descriptor: int) -> bool:
    """Lock a whole file; the system releases it when the process ends, however it ends."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def load(store: Path) -> Path | None:
    """The wheel of a key, if it is there and whole."""
    for wheel in store.glob("*.whl"):
        record = wheel.with_suffix(".sha256")
        if record.is_file() and record.read_text() == _digest(wheel):
            return wheel
    return None


def save(store: Path, wheel: Path) -> None:
    """Keep a wheel: whole or not at all."""
    store.mkdir(parents=True, exist_ok=True)
    target = store / wheel.name
    temporary = store / f".{wheel.name}.{os.getpid()}"
    shutil.copy2(wheel, temporary)
    digest = _digest(temporary)
    target.with_suffix(".sha256").write_text(digest)
    os.replace(temporary, target)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
