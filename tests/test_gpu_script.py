"""benchmarks/gpu.py as far as it goes without a GPU and without a compiler: what it packs, and that it goes on."""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from aisp_build import cache, series, source

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the script is for Linux")

ROOT = Path(__file__).resolve().parents[1]
LLAMA = "vendor/llama.cpp/"


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_script", ROOT / "benchmarks" / "gpu.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_script"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "travels"),
    [
        ("CMakeLists.txt", True),
        ("llama_cpp/llama_cpp.py", True),
        ("docs/index.md", False),
        (LLAMA + "CMakeLists.txt", True),
        (LLAMA + "src/models/llama.cpp", True),
        (LLAMA + "ggml/src/ggml.c", True),
        (LLAMA + "ggml/src/ggml-cuda/mmq.cu", True),
        (LLAMA + "ggml/src/ggml-cpu/amx/mmq.cpp", True),
        (LLAMA + "ggml/src/ggml-vulkan/ggml-vulkan.cpp", False),
        (LLAMA + "ggml/src/ggml-metal/ggml-metal.metal", False),
        (LLAMA + "tools/batched-bench/main.cpp", True),
        (LLAMA + "tools/server/server.cpp", False),
        (LLAMA + "vendor/miniaudio/CMakeLists.txt", True),
        (LLAMA + "vendor/miniaudio/miniaudio.h", False),
        (LLAMA + "models/ggml-vocab-llama.gguf", False),
        (LLAMA + "media/llama1-logo.png", False),
    ],
)
def test_only_what_the_build_reads_travels(gpu: ModuleType, name: str, travels: bool) -> None:
    assert gpu.packed(name) is travels


def members(path: Path) -> set[str]:
    with tarfile.open(path) as archive:
        return set(archive.getnames())


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An sdist of a few files in place of the pinned one, no series, and no package index."""
    path = tmp_path / "sdist.tar.gz"
    files = ("CMakeLists.txt", "docs/a.md", "llama_cpp/__init__.py", LLAMA + "src/llama.cpp", LLAMA + "include/llama.h")
    with tarfile.open(path, "w:gz") as archive:
        for name in files:
            info = tarfile.TarInfo(f"llama_cpp_python-0.3.36/{name}")
            archive.addfile(info, io.BytesIO())
    monkeypatch.setattr(source, "fetch", lambda *_: path)
    monkeypatch.setattr(source, "set_version", lambda *_: None)
    monkeypatch.setattr(series, "apply", lambda _, tree: (tree / LLAMA / "src" / "patched.cpp").touch())
    monkeypatch.setattr(cache, "folder", lambda: tmp_path / "cache")

    def no_index(command: list[str], **_: Any) -> None:
        folder = Path(command[command.index("-d") + 1])
        folder.mkdir()
        (folder / "gguf-0-py3-none-any.whl").touch()

    monkeypatch.setattr(subprocess, "run", no_index)
    return path


def test_the_archive_holds_project_source_and_wheels(gpu: ModuleType, small: Path, tmp_path: Path) -> None:
    archive = gpu.pack(tmp_path / "out.tar.gz", small)
    # What else the real one holds is pinned, patched source and small wheels: 4.3 MiB.
    assert archive.stat().st_size < gpu.MAX_BYTES - 10 * 2**20
    names = members(archive)
    needed = ("benchmarks/gpu.py", "benchmarks/gpu_tools/CMakeLists.txt", "tests/proof.py", "patches/backend.py")
    needed += (
        "aisp_local/bench/synthetic.py",
        "models/storyteller/storyteller.gguf",
        "reward_models/story-reward/reward.json",
    )
    needed += (
        "parts/wheels/gguf-0-py3-none-any.whl",
        f"parts/source/{LLAMA}src/patched.cpp",
        "parts/stock/src/llama.cpp",
    )
    assert {f"aisp-gpu/{name}" for name in needed} <= names
    assert "aisp-gpu/parts/stock/src/patched.cpp" not in names
    assert not any("__pycache__" in name or name.startswith("aisp-gpu/parts/source/docs") for name in names)


def test_an_archive_above_the_limit_is_refused(gpu: ModuleType, small: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="MiB, more than"):
        gpu.pack(tmp_path / "out.tar.gz", small, limit=1000)


@pytest.mark.slow
def test_the_real_archive_is_below_the_limit(gpu: ModuleType, tmp_path: Path) -> None:
    """Slow: it asks the package index. By default the project's part of the size is checked, which is what grows."""
    names = members(gpu.pack(tmp_path / "out.tar.gz", None))
    assert f"aisp-gpu/parts/source/{LLAMA}ggml/src/ggml-cuda/getrows.cu" in names
    assert any(name.startswith("aisp-gpu/parts/wheels/diskcache-") for name in names)


@pytest.fixture
def machine(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "parts" / "source").mkdir(parents=True)
    monkeypatch.setattr(gpu, "PARTS", tmp_path / "parts")

    def python(code: str) -> Any:
        return lambda _: [gpu.Call([sys.executable, "-c", code], stdin="text")]

    steps = {
        "good": python("import sys; print('{\"tables\": []}'); print(sys.stdin.read())"),
        "bad": python("print('{\"half\": 1}'); raise SystemExit('because')"),
        "slow": python("import time; time.sleep(60)"),
        "broken": lambda _: 1 / 0,
        "last": python(""),
    }
    monkeypatch.setattr(gpu, "STEPS", steps)
    return gpu.Machine(tmp_path / "work", cpu=True, limit=2.0)


def test_a_step_that_fails_is_recorded_and_the_others_go_on(gpu: ModuleType, machine: Any) -> None:
    assert gpu.run(machine, list(gpu.STEPS)) == 1
    result = json.loads((machine.work / "report.json").read_text())
    codes = {name: step["code"] for name, step in result["steps"].items()}
    assert codes == {"good": 0, "bad": 1, "slow": 124, "broken": -1, "last": 0}
    assert result["steps"]["bad"]["tail"][-1] == "because"
    assert result["steps"]["bad"]["found"] == [{"half": 1}]
    assert "ZeroDivisionError" in result["steps"]["broken"]["tail"][-1]
    text = (machine.work / "report.md").read_text()
    assert "| slow | time limit |" in text and "| bad | FAILED (1) |" in text


def test_later_runs_complete_the_report(gpu: ModuleType, machine: Any) -> None:
    assert gpu.run(machine, ["bad"]) == 1
    assert gpu.run(machine, ["good"]) == 0
    result = json.loads((machine.work / "report.json").read_text())
    assert list(result["steps"]) == ["good", "bad"]


def test_without_the_packed_source_it_says_what_to_do(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "PARTS", tmp_path / "nothing")
    with pytest.raises(SystemExit, match="gpu.py pack"):
        gpu.run(gpu.Machine(tmp_path, cpu=True), ["prepare"])


def found(switched_off: str, digest: str, error: float) -> dict[str, Any]:
    return {"switched_off": switched_off, "replays": [{"model": "m", "digest": digest, "error": error}]}


def test_graphs_change_no_bit_and_fusion_no_more_than_rounding(gpu: ModuleType) -> None:
    same = {"found": [found("nothing", "a", 1e-3), found("graphs", "a", 1e-3), found("fusion", "b", 9e-4)]}
    assert gpu.check_replays(same) == []
    bits = {"found": [found("nothing", "a", 1e-3), found("graphs", "b", 1e-3)]}
    assert "CUDA graphs" in gpu.check_replays(bits)[0]
    error = {"found": [found("nothing", "a", 1e-2), found("fusion", "b", 1e-3)]}
    assert "fusion" in gpu.check_replays(error)[0]


def test_goals_are_compared_with_the_tables(gpu: ModuleType) -> None:
    speed = {"name": "speed", "title": "t", "columns": [], "rows": [["engine, greedy", 1.0, "0.960 (0.9 to 1)", ""]]}
    methods = {"name": "methods", "title": "t", "columns": [], "rows": [["aisp", 1.0, "1.060 (1 to 2)", 1, ""]]}
    torch = {"results": [{"n": 8, "ratio": [3.5, 3, 4]}]}
    steps = {"speed": {"found": [{"tables": [speed]}]}, "methods": {"found": [{"tables": [methods]}]}}
    lines = gpu.goals(steps | {"torch": {"found": [torch]}})
    assert [line.rsplit(" ", 1)[1] for line in lines] == ["met", "MISSED", "met"]
