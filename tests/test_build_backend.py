"""The build backend of patches/: everything but the compiler run."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import sys
import tarfile
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aisp_build import cache, series, source
from aisp_build.errors import BuildError

PATCHES = Path(__file__).resolve().parents[1] / "patches"
FILES = {"llama_cpp/__init__.py": '__version__ = "0.3.36"\n', "src/a.cpp": "one\ntwo\nthree\n"}
PATCH = "--- a/src/a.cpp\n+++ b/src/a.cpp\n@@ -1,3 +1,3 @@\n one\n-two\n+2\n three\n"


def archive(path: Path, files: dict[str, str], top: str = "llama_cpp_python-0.3.36/") -> source.Pin:
    """Write a small sdist and return its pin."""
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(top + name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return source.Pin("llama-cpp-python", "0.3.36", digest, "aisp.1")


@pytest.fixture
def sdist(tmp_path: Path) -> tuple[Path, source.Pin]:
    path = tmp_path / "llama_cpp_python-0.3.36.tar.gz"
    return path, archive(path, FILES)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("CMAKE_ARGS", "CC", "CXX", "CUDACXX", "CUDAARCHS", "CFLAGS", "AISP_LLAMA_SDIST"):
        monkeypatch.delenv(name, raising=False)
    yield tmp_path / "cache"


def test_the_pin_and_the_series_are_there() -> None:
    pin = source.read_pin(PATCHES / "pin.toml")
    assert (pin.version, pin.local, len(pin.sha256)) == ("0.3.36", "aisp.1", 64)
    assert pin.sdist == "llama_cpp_python-0.3.36.tar.gz"
    assert len(series.patches(PATCHES / "series")) >= 2


def test_unpack_patch_and_version(sdist: tuple[Path, source.Pin], tmp_path: Path) -> None:
    path, pin = sdist
    assert source.fetch(pin, tmp_path / "sdists", str(path)) == path
    work = tmp_path / "work"
    work.mkdir()
    tree = source.unpack(path, work)
    folder = tmp_path / "series"
    folder.mkdir()
    (folder / "0001-x.patch").write_text(PATCH)
    series.apply(folder, tree)
    source.set_version(tree, pin)
    assert (tree / "src/a.cpp").read_text() == "one\n2\nthree\n"
    assert (tree / "llama_cpp/__init__.py").read_text() == '__version__ = "0.3.36+aisp.1"\n'
    series.apply(folder, tree)  # already applied: nothing changes
    assert (tree / "src/a.cpp").read_text() == "one\n2\nthree\n"
    with pytest.raises(BuildError, match="out of date"):
        source.set_version(tree, pin)


def test_a_patch_for_another_release_is_named(sdist: tuple[Path, source.Pin], tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    tree = source.unpack(sdist[0], tmp_path / "work")
    folder = tmp_path / "series"
    folder.mkdir()
    (folder / "0007-other.patch").write_text(PATCH.replace(" three", " tree"))
    with pytest.raises(BuildError, match=r"0007-other\.patch does not apply"):
        series.apply(folder, tree)
    assert (tree / "src/a.cpp").read_text() == FILES["src/a.cpp"]


def test_wrong_files_are_refused(sdist: tuple[Path, source.Pin], tmp_path: Path) -> None:
    path, pin = sdist
    with pytest.raises(BuildError, match="does not exist; check AISP_LLAMA_SDIST"):
        source.fetch(pin, tmp_path, str(tmp_path / "nowhere.tar.gz"))
    other = source.Pin(pin.name, pin.version, "0" * 64, pin.local)
    with pytest.raises(BuildError, match="has the sha256"):
        source.fetch(other, tmp_path, str(path))
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(BuildError, match="cannot be unpacked"):
        source.unpack(path, tmp_path / "work")


@pytest.mark.parametrize("filtered", [True, False])
def test_paths_that_leave_the_archive_are_refused(
    filtered: bool, sdist: tuple[Path, source.Pin], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With tarfile's own filter and, as on Python 3.11.2, without it."""
    if not filtered:
        monkeypatch.delattr(tarfile, "data_filter", raising=False)
    (tmp_path / "good").mkdir()
    assert (source.unpack(sdist[0], tmp_path / "good") / "src/a.cpp").read_text() == FILES["src/a.cpp"]
    path = tmp_path / "evil.tar.gz"
    archive(path, {"x.txt": "evil"}, top="../")
    (tmp_path / "work").mkdir()
    with pytest.raises(BuildError, match="cannot be unpacked"):
        source.unpack(path, tmp_path / "work")
    assert not (tmp_path / "x.txt").exists()


def test_a_failed_download_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    pin = source.Pin("llama-cpp-python", "0.3.36", "0" * 64, "aisp.1")
    with pytest.raises(BuildError, match=r"could not be downloaded .* or set AISP_LLAMA_SDIST"):
        source.fetch(pin, tmp_path / "sdists")


def test_a_missing_compiler_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cache.require_compiler()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match="no C\\+\\+ compiler was found; install one"):
        cache.require_compiler()
    monkeypatch.setenv("CXX", "nocompiler")
    with pytest.raises(BuildError, match="CXX=nocompiler was not found"):
        cache.require_compiler()


def key(settings: dict[str, Any] | None = None, folder: Path = PATCHES, sha: str = "a") -> str:
    return cache.wheel_key(folder, sha, settings or {})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CMAKE_ARGS", "-DGGML_CUDA=on"),
        ("CMAKE_ARGS", "-DGGML_NATIVE=OFF"),
        ("CFLAGS", "-O1"),
        ("CXX", "clang++"),
        ("GGML_X", "1"),
    ],
)
def test_what_determines_a_wheel_is_in_its_key(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = key()
    assert before == key()
    monkeypatch.setenv(name, value)
    assert key() != before
    monkeypatch.setenv(name, "")
    assert key() == before


def tool(path: Path, says: str) -> None:
    path.write_text(f"#!/bin/sh\necho {says} $*\n")
    path.chmod(0o755)


@pytest.mark.parametrize("variable", ["CC", "CXX"])
@pytest.mark.parametrize("command", ["mine", "mine --target=x", "wrapper mine"])
def test_a_compiler_of_the_environment_is_known_by_its_version(
    variable: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wrapper").write_text('#!/bin/sh\nexec "$@"\n')
    (tmp_path / "wrapper").chmod(0o755)
    tool(tmp_path / "mine", "compiler 1.0")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv(variable, command)
    before = key()
    assert before == key()
    tool(tmp_path / "mine", "compiler 2.0")
    assert key() != before


def test_nvcc_counts_where_cuda_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    def keys() -> list[str]:
        found = [key(), key({"cmake.define.GGML_CUDA": "ON"})]
        with monkeypatch.context() as patch:
            patch.setenv("CMAKE_ARGS", "-DGGML_CUDA=on")
            return [*found, key()]

    tool(tmp_path / "nvcc", "release 12.4")
    old = keys()
    tool(tmp_path / "nvcc", "release 13.0")
    assert [a == b for a, b in zip(old, keys(), strict=True)] == [True, False, False]
    (tmp_path / "cuda/bin").mkdir(parents=True)
    (tmp_path / "nvcc").rename(tmp_path / "cuda/bin/nvcc")
    monkeypatch.setenv("CUDACXX", str(tmp_path / "cuda/bin/nvcc"))
    assert cache.cuda_compiler() == [str(tmp_path / "cuda/bin/nvcc")]
    monkeypatch.delenv("CUDACXX")
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "cuda"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cache.cuda_compiler() == [str(tmp_path / "cuda/bin/nvcc")]


def test_the_key_follows_sources_and_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert key({"cmake.define.X": "1"}) != key()
    assert key(sha="b") != key()
    monkeypatch.setenv("CMAKE_BUILD_PARALLEL_LEVEL", "1")
    again = key()
    monkeypatch.setenv("CMAKE_BUILD_PARALLEL_LEVEL", "2")
    assert key() == again
    (tmp_path / "series").mkdir()
    (tmp_path / "series/0001-x.patch").write_text(PATCH)
    first = key(folder=tmp_path)
    (tmp_path / "series/0001-x.patch").write_text(PATCH + "\n")
    assert key(folder=tmp_path) != first


def test_a_native_wheel_depends_on_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key()
    monkeypatch.setattr(cache, "_cpu", lambda: "another processor")
    assert key() != before
    monkeypatch.setenv("CMAKE_ARGS", "-DGGML_NATIVE=OFF")
    portable = key()
    monkeypatch.setattr(cache, "_cpu", lambda: "a third")
    assert key() == portable


def test_the_cache_gives_back_only_whole_wheels(tmp_path: Path) -> None:
    wheel = tmp_path / "x-1-py3-none-any.whl"
    wheel.write_bytes(b"wheel")
    store = cache.folder() / "wheels" / "k"
    assert cache.load(store) is None
    cache.save(store, wheel)
    found = cache.load(store)
    assert found is not None and found.read_bytes() == b"wheel"
    assert sorted(p.suffix for p in store.iterdir()) == [".sha256", ".whl"]
    found.write_bytes(b"whee")
    assert cache.load(store) is None
    cache.save(store, wheel)
    assert cache.load(store) is not None


def test_two_builds_of_one_key_wait_for_each_other() -> None:
    store = cache.folder() / "wheels" / "k"
    order: list[str] = []
    inside = threading.Event()

    def second() -> None:
        inside.wait()
        with cache.lock(store):
            order.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    with cache.lock(store):
        inside.set()
        with pytest.raises(BuildError, match="another build holds"), cache.lock(store, timeout=0.0):
            pass
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


Call = tuple[dict[str, Any], str, str | None]


@pytest.fixture
def compiles(sdist: tuple[Path, source.Pin], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """The backend over a small series; of each compilation: settings, version of the tree, CMAKE_ARGS.

    Only scikit-build-core's own entry is replaced: what it is given is what counts.
    """
    import backend

    path, pin = sdist
    calls: list[Call] = []

    def build_wheel(directory: str, settings: dict[str, Any], metadata: None) -> str:
        version = Path("llama_cpp/__init__.py").read_text()
        calls.append((dict(settings), version, os.environ.get("CMAKE_ARGS")))
        (Path(directory) / "w-1-py3-none-any.whl").write_bytes(b"built")
        return "w-1-py3-none-any.whl"

    package = types.ModuleType("scikit_build_core")
    package.build = types.SimpleNamespace(build_wheel=build_wheel)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "scikit_build_core", package)
    here = tmp_path / "patches"
    (here / "series").mkdir(parents=True)
    (here / "series/0001-x.patch").write_text(PATCH)
    (here / "pin.toml").write_text(
        f'name = "{pin.name}"\nversion = "{pin.version}"\nsha256 = "{pin.sha256}"\nlocal = "{pin.local}"\n'
    )
    monkeypatch.setattr(backend, "HERE", here)
    monkeypatch.setenv("AISP_LLAMA_SDIST", str(path))
    return calls


def test_the_backend_delegates_once_and_then_uses_the_cache(
    compiles: list[Call], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import backend

    monkeypatch.setenv("CMAKE_ARGS", "-DGGML_CUDA=on")
    for out in ("one", "two"):
        (tmp_path / out).mkdir()
        name = backend.build_wheel(str(tmp_path / out), {"cmake.define.MINE": "1"})
        assert (tmp_path / out / name).read_bytes() == b"built"
    assert compiles == [
        (
            {"cmake.define.LLAVA_BUILD": "OFF", "cmake.define.MINE": "1"},
            '__version__ = "0.3.36+aisp.1"\n',
            "-DGGML_CUDA=on",
        )
    ]
    monkeypatch.setenv("AISP_NO_WHEEL_CACHE", "1")
    backend.build_wheel(str(tmp_path / "one"), {"cmake.define.MINE": "1"})
    assert len(compiles) == 2


@pytest.mark.parametrize("blocked", ["", "aisp-local", "aisp-local/sdists"])
def test_a_cache_that_cannot_be_written_does_not_stop_the_build(
    blocked: str,
    compiles: list[Call],
    sdist: tuple[Path, source.Pin],
    own_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A file where a folder must be made: nobody can write there, not even root."""
    import backend

    (own_cache / blocked).parent.mkdir(parents=True, exist_ok=True)
    (own_cache / blocked).write_text("in the way")
    monkeypatch.delenv("AISP_LLAMA_SDIST")
    monkeypatch.setattr(source, "download", lambda pin, folder: shutil.copy(sdist[0], folder))
    (tmp_path / "out").mkdir()
    for _ in range(2):
        name = backend.build_wheel(str(tmp_path / "out"))
        assert (tmp_path / "out" / name).read_bytes() == b"built"
        said = capsys.readouterr().err
        assert said.count("cannot be written") == 1 and said.startswith("warning: building without the cache")
        assert "set XDG_CACHE_HOME" in said
    assert len(compiles) == 2
    assert (own_cache / blocked).read_text() == "in the way"


@pytest.mark.parametrize(
    ("platform", "place"), [("win32", "LOCALAPPDATA"), ("darwin", "~/Library/Caches"), ("linux", "XDG_CACHE_HOME")]
)
def test_the_advice_is_the_platforms(platform: str, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    assert place in cache.advice()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (SystemExit(1), "llama.cpp did not compile; the compiler's"),
        (OSError("no space"), "llama.cpp did not compile (OSError: no space); the"),
    ],
)
def test_a_failed_compilation_points_at_the_compiler(
    error: BaseException,
    said: str,
    compiles: list[Call],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import backend

    def fail(*_: object) -> str:
        raise error

    monkeypatch.setattr(sys.modules["scikit_build_core"].build, "build_wheel", fail)
    with pytest.raises(SystemExit):
        backend.build_wheel(str(tmp_path))
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith(f"error: {said}")


def test_errors_are_the_last_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import backend

    monkeypatch.setenv("AISP_LLAMA_SDIST", str(tmp_path / "nowhere.tar.gz"))
    with pytest.raises(SystemExit):
        backend.build_wheel(str(tmp_path))
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: the local sdist") and last.endswith("check AISP_LLAMA_SDIST")


@pytest.mark.parametrize(
    ("said", "wanted"), [("3.16.3", ["cmake>=3.21"]), ("3.21.0", []), ("4.1.2", []), ("", ["cmake>=3.21"])]
)
def test_an_old_or_missing_cmake_comes_from_the_index(
    said: str, wanted: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import backend

    for tool, text in (("cmake", f"cmake version {said}"), ("ninja", "1.11.1")):
        if tool == "ninja" or said:
            (tmp_path / tool).write_text(f"#!/bin/sh\necho {text}\n")
            (tmp_path / tool).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert backend.get_requires_for_build_wheel() == wanted


def test_an_editable_install_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import backend

    with pytest.raises(SystemExit):
        backend.build_editable(str(tmp_path))
    assert capsys.readouterr().err.strip().endswith("use: pip install ./patches")
