"""PEP 517 backend: the pinned llama-cpp-python, patched, built by scikit-build-core, cached."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from aisp_build import cache, series, source
from aisp_build.errors import BuildError

HERE = Path(__file__).resolve().parent
Settings = Mapping[str, str | list[str]] | None


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    """cmake and ninja from the package index, where the system has none or an older one."""
    wanted = {"cmake": (3, 21), "ninja": (1, 5)}
    return [f"{tool}>={least[0]}.{least[1]}" for tool, least in wanted.items() if _version(tool) < least]


def build_wheel(wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None) -> str:
    """Put the wheel into ``wheel_directory`` and return its file name."""
    try:
        return _build(Path(wheel_directory).resolve(), dict(config_settings or {}))
    except BuildError as error:
        # The sentence last, where it is seen: pip prints what the backend prints, in order.
        print(f"\nerror: {error}\n", file=sys.stderr, flush=True)
        raise SystemExit(1) from None


def build_editable(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    """Refused with a sentence: there is no source tree to edit here."""
    print("\nerror: patches/ cannot be installed with -e; use: pip install ./patches\n", file=sys.stderr, flush=True)
    raise SystemExit(1)


def _version(tool: str) -> tuple[int, int]:
    """The installed version of a tool; (0, 0) if it is missing or does not say."""
    command = shutil.which(tool)
    if command is None:
        return 0, 0
    said = subprocess.run([command, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"(\d+)\.(\d+)", said)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _build(target: Path, settings: dict[str, str | list[str]]) -> str:
    pin = source.read_pin(HERE / "pin.toml")
    local_sdist = settings.pop("sdist", None) or os.environ.get("AISP_LLAMA_SDIST")
    if not cache.writable():
        return _make(pin, None, local_sdist, target, settings)
    store = cache.folder() / "wheels" / cache.wheel_key(HERE, pin.sha256, settings)
    use_cache = os.environ.get("AISP_NO_WHEEL_CACHE", "") in ("", "0")
    with cache.lock(store):
        found = cache.load(store) if use_cache else None
        if found is not None:
            shutil.copy2(found, target / found.name)
            print(f"{found.name} from the cache {store}", file=sys.stderr)
            return found.name
        name = _make(pin, cache.folder() / "sdists", local_sdist, target, settings)
        if use_cache:
            try:
                cache.save(store, target / name)
            except OSError as error:
                print(f"notice: the wheel is built but could not be kept in {store} ({error})", file=sys.stderr)
    return name


def _make(
    pin: source.Pin,
    sdists: Path | None,
    local_sdist: str | list[str] | None,
    target: Path,
    settings: dict[str, str | list[str]],
) -> str:
    """Fetch (into ``sdists``, where there is a cache), unpack, patch, compile into ``target``; the wheel's name."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="aisp-build-") as work:
        sdist = source.fetch(pin, sdists or Path(work) / "sdists", local_sdist)
        tree = source.unpack(sdist, Path(work) / "tree")
        series.apply(HERE / "series", tree)
        source.set_version(tree, pin)
        name = compile_tree(tree, target, settings)
    print(f"built {name} in {time.monotonic() - start:.0f} s", file=sys.stderr)
    return name


def compile_tree(tree: Path, target: Path, settings: dict[str, str | list[str]]) -> str:
    """Delegate to scikit-build-core in the patched tree; CMAKE_ARGS is read there."""
    from scikit_build_core import build as scikit_build

    cache.require_compiler()
    # The multimodal library is not needed here and doubles the build.
    settings = {"cmake.define.LLAVA_BUILD": "OFF", **settings}
    os.environ.setdefault("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))
    before = Path.cwd()
    os.chdir(tree)
    try:
        return str(scikit_build.build_wheel(str(target), settings, None))
    except (SystemExit, Exception) as error:
        # scikit-build-core prints what failed and exits; the exit code says nothing to a person.
        reason = "" if isinstance(error, SystemExit) else f" ({type(error).__name__}: {error})"
        raise BuildError(
            f"llama.cpp did not compile{reason}; the compiler's message stands above: check the compiler and CMAKE_ARGS"
        ) from error
    finally:
        os.chdir(before)
