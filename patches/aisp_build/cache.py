"""Built wheels, kept under a hash of everything that determines them."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
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


def advice() -> str:
    """What to do about a cache folder that cannot be written."""
    if sys.platform == "win32":
        return "set LOCALAPPDATA to a writable folder"
    if sys.platform == "darwin":
        return "make ~/Library/Caches writable"
    return "set XDG_CACHE_HOME to a writable folder"


def writable() -> bool:
    """Whether wheels and sdists can be kept; a sentence on stderr if not."""
    try:
        for part in ("wheels", "sdists"):
            place = folder() / part
            place.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=place).close()
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
        print(f"warning: building without the cache, which cannot be written ({error}); {advice()}", file=sys.stderr)
        return False
    return True


_CC = ("cc", "gcc", "clang", "cl")
_CXX = ("c++", "g++", "clang++", "cl")


def compiler(variable: str = "CXX", names: Sequence[str] = _CXX) -> list[str] | None:
    """The command of the compiler that CMake will choose: the variable's, else the first found. None without one."""
    value = os.environ.get(variable, "").strip()
    named = [value] if shutil.which(value) else shlex.split(value, posix=os.name == "posix")
    for name, *arguments in [named] if named else [[name] for name in names]:
        found = shutil.which(name)
        if found:
            return [found, *arguments]
    return None


def cuda_compiler() -> list[str] | None:
    """nvcc where CMake looks for it."""
    toolkits = [os.environ.get(name) for name in ("CUDA_PATH", "CUDA_HOME", "CUDAToolkit_ROOT")]
    folders = [str(Path(toolkit) / "bin") for toolkit in [*toolkits, "/usr/local/cuda"] if toolkit]
    found = shutil.which("nvcc", path=os.pathsep.join([os.environ.get("PATH", os.defpath), *folders]))
    return compiler("CUDACXX", [found] if found else [])


def require_compiler() -> None:
    """Raises BuildError without a C++ compiler."""
    if compiler() is None:
        named = os.environ.get("CXX")
        what = f"the compiler CXX={named} was not found" if named else "no C++ compiler was found"
        raise BuildError(
            f"{what}; install one (Debian: apt install g++; macOS: xcode-select --install; "
            "Windows: Visual Studio Build Tools)"
        )


def _identity(command: list[str] | None) -> str:
    """Where a compiler lies and which version it says it is."""
    if command is None:
        return "none"
    result = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    return f"{os.path.realpath(command[0])} {result.stdout or result.stderr}"


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
        if value and (name in _ENVIRONMENT or name.startswith(_PREFIXES)) and name not in _NO_PART
    }
    native = "GGML_NATIVE=OFF" not in os.environ.get("CMAKE_ARGS", "").replace(":BOOL", "").upper()
    cuda = "CUDA" in f"{environment} {dict(settings)}".upper()
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
        "compilers": [_identity(compiler("CC", _CC)), _identity(compiler())],
        "nvcc": _identity(cuda_compiler()) if cuda else "",
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
        raise BuildError(f"the cache {path.parent} cannot be written ({error}); {advice()}") from error
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
