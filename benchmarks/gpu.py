"""Build, prove and measure on a GPU, from one file and without a network (docs/gpu.md).

    python benchmarks/gpu.py pack [aisp-gpu.tar.gz]            where a package index is; needs pip
    tar xf aisp-gpu.tar.gz && python3 aisp-gpu/benchmarks/gpu.py run [--only build,proof] [--cpu]

``pack`` takes the patched source of the pinned llama-cpp-python without what a CUDA build does not read, this project,
and pure Python wheels that a machine with PyTorch may lack. ``run`` goes through the steps, each a process of its own
with a time limit, and goes on after one that fails; what was found is in report.md and report.json, which later runs
with ``--only`` complete. Exit code 1 if a step failed. ``--cpu`` runs the same without a GPU, in small sizes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PARTS = ROOT / "parts"  # of the packed folder: source, stock, wheels
MAX_BYTES = 60 * 2**20

PROJECT = ("aisp_local", "benchmarks", "cli.py", "docs", "examples", "LICENSE", "models/storyteller", "models/talker",
           "patches", "pyproject.toml", "README.md", "reward_models/cheer", "reward_models/cheer-judge",
           "reward_models/story-judge", "reward_models/story-reward", "tests", "THIRD_PARTY_NOTICES.md")  # fmt: skip
SOURCE = ("CMakeLists.txt", "LICENSE.md", "README.md", "llama_cpp", "pyproject.toml")
LLAMA = ("CMakeLists.txt", "LICENSE", "cmake", "common", "ggml", "include", "licenses", "src", "tools/batched-bench",
         "vendor")  # fmt: skip
BACKENDS = ("ggml-cpu", "ggml-cuda")
WHEELS = (
    "gguf",
    "diskcache",
    "scikit-build-core",
    "packaging",
    "pathspec",
    "typing-extensions",
    "click",
    "jinja2",
    "tqdm",
)


def packed(name: str) -> bool:
    """Whether a file of the patched tree, by its path below the top, travels."""
    inside = name.removeprefix("vendor/llama.cpp/")
    if inside == name:
        return name.split("/")[0] in SOURCE
    if not any(inside == part or inside.startswith(part + "/") for part in LLAMA):
        return False
    parts = inside.split("/")
    if parts[:2] == ["ggml", "src"] and len(parts) > 3:
        return parts[2] in BACKENDS
    return not inside.startswith(("vendor/miniaudio/miniaudio", "vendor/stb/stb"))


def pack(target: Path, sdist: Path | None, limit: int = MAX_BYTES) -> Path:
    """Write the archive. Raises SystemExit if it is larger than the limit."""
    sys.path.insert(0, str(ROOT / "patches"))
    from aisp_build import cache, series, source

    with tempfile.TemporaryDirectory(prefix="aisp-pack-") as temporary:
        work = Path(temporary)
        pin = source.read_pin(ROOT / "patches" / "pin.toml")
        found = source.fetch(pin, cache.folder() / "sdists", str(sdist) if sdist else None)
        tree = source.unpack(found, work / "tree")
        llama = tree / "vendor" / "llama.cpp"
        stock = {name: work / "stock" / name for name in ("include", "src")}
        for name, copy in stock.items():
            shutil.copytree(llama / name, copy)
        shutil.copytree(tree / "llama_cpp", work / "stock" / "llama_cpp")
        _patch_module(work / "modules")
        series.apply(ROOT / "patches" / "series", tree)
        source.set_version(tree, pin)
        wheels = work / "wheels"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        # Any machine's Python: what comes then is pure or not at all.
        command += ["--platform", "any", "--python-version", "3.11", "-d", str(wheels), *WHEELS]
        subprocess.run(command, check=True)
        with tarfile.open(target, "w:gz") as archive:
            for name in PROJECT:
                archive.add(ROOT / name, f"aisp-gpu/{name}", filter=_clean)
            files = sorted(path for path in tree.rglob("*") if path.is_file())
            for path in files:
                name = path.relative_to(tree).as_posix()
                if packed(name):
                    archive.add(path, f"aisp-gpu/parts/source/{name}", filter=_clean)
            archive.add(work / "stock", "aisp-gpu/parts/stock", filter=_clean)
            archive.add(wheels, "aisp-gpu/parts/wheels", filter=_clean)
    size = target.stat().st_size
    if size > limit:
        raise SystemExit(f"{target} has {size / 2**20:.1f} MiB, more than {limit / 2**20:.0f}")
    print(f"{target}: {size / 2**20:.1f} MiB")
    return target


def _patch_module(folder: Path) -> None:
    """Make patch_ng importable, which applies the series."""
    try:
        import patch_ng  # noqa: F401
    except ImportError:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder), "patch-ng"]
        subprocess.run(command, check=True)
        sys.path.insert(0, str(folder))


def _clean(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """No build results and no names of users."""
    name = Path(info.name)
    if "__pycache__" in name.parts or name.suffix in (".so", ".pyc"):
        return None
    info.uid = info.gid = 0
    info.uname = info.gname = ""
    return info


@dataclass
class Machine:
    """Where the steps run, and in which sizes."""

    work: Path
    cpu: bool
    gpu: dict[str, str] = field(default_factory=dict)
    architecture: str = ""
    limit: float = 590.0
    everything: bool = False

    @property
    def site(self) -> Path:
        return self.work / "site"

    @property
    def libraries(self) -> Path:
        return self.site / "llama_cpp" / "lib"

    @property
    def model(self) -> Path:
        return self.work / ("llama-small.gguf" if self.cpu else "llama-8b.gguf")

    @property
    def bench(self) -> Path:
        return self.work / "tools" / "bin" / "batched-bench"

    @property
    def rows(self) -> list[str]:
        return ["2", "4"] if self.cpu else ["8", "32", "64"]

    def environment(self) -> dict[str, str]:
        """Of every step: our packages before those of the machine, and no way to a network."""
        paths = [str(self.site), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        libraries = [*cuda_libraries(), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
        return os.environ | {
            "PYTHONPATH": os.pathsep.join(paths),
            "LD_LIBRARY_PATH": os.pathsep.join(libraries),
            "AISP_TEST_GPU_LAYERS": "0" if self.cpu else "-1",
            "HF_HUB_OFFLINE": "1",
            "PIP_NO_INDEX": "1",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "TMPDIR": str(self.work / "tmp"),
        }


def nvcc() -> Path | None:
    sys.path.insert(0, str(ROOT / "patches"))
    from aisp_build import cache

    found = cache.cuda_compiler()
    return Path(found[0]) if found else None


def cuda_libraries() -> list[str]:
    """Folders of the toolkit's libraries, for machines whose linker does not know them."""
    compiler = nvcc()
    if compiler is None:
        return []
    top = compiler.resolve().parents[1]
    return [str(path) for name in ("lib64", "lib", "targets/x86_64-linux/lib") if (path := top / name).is_dir()]


def graphics_card() -> dict[str, str]:
    """Name, compute capability, memory and driver of the first GPU; empty without one."""
    names = ("name", "compute_cap", "memory.total", "driver_version")
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    return dict(zip(names, (part.strip() for part in lines[0].split(",")), strict=True)) if lines else {}


@dataclass
class Call:
    """A command, what it changes in the environment, and what it reads."""

    command: Sequence[str]
    changes: dict[str, str] = field(default_factory=dict)
    stdin: str = ""


def prepare(machine: Machine) -> list[Call]:
    """Install those of the carried wheels that this machine lacks."""
    missing = []
    for wheel in sorted((PARTS / "wheels").glob("*.whl")):
        try:
            metadata.version(wheel.name.split("-")[0].replace("_", "-"))
        except metadata.PackageNotFoundError:
            missing.append(str(wheel))
    if not missing:
        return []
    return [Call(_install(machine, *missing))]


def _install(machine: Machine, *wheels: str) -> list[str]:
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--upgrade"]
    return [*command, "--target", str(machine.site), *wheels]


def build(machine: Machine) -> list[Call]:
    """The wheel, as pip install ./patches makes it, from the tree that ``pack`` has patched."""
    arguments = ["-DCMAKE_PLATFORM_NO_VERSIONED_SONAME=ON"]  # else each library is in the wheel three times
    changes = {}
    if not machine.cpu:
        arguments += ["-DGGML_CUDA=ON", f"-DCMAKE_CUDA_ARCHITECTURES={machine.architecture}"]
        arguments += ["-DGGML_CUDA_FA_ALL_QUANTS=OFF", "-DGGML_CUDA_NCCL=OFF"]
        compiler = nvcc()
        if compiler is not None:
            changes["CUDACXX"] = str(compiler)
    changes["CMAKE_ARGS"] = " ".join([*arguments, *filter(None, [os.environ.get("CMAKE_ARGS")])])
    wheels, folder = machine.work / "wheels", machine.work / "build"
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import backend;"
        "backend.compile_tree(Path(sys.argv[2]), Path(sys.argv[3]), {'build-dir': sys.argv[4]})"
    )
    parts = [str(ROOT / "patches"), str(PARTS / "source"), str(wheels), str(folder)]
    install = "import glob, subprocess, sys; sys.exit(subprocess.call([*sys.argv[2:], *glob.glob(sys.argv[1])]))"
    loads = "import sys, llama_cpp as C; gpu = C.llama_supports_gpu_offload(); print('offloads:', gpu);"
    return [
        Call([sys.executable, "-c", code, *parts], changes),
        Call([sys.executable, "-c", install, str(wheels / "*.whl"), *_install(machine)]),
        Call([sys.executable, "-c", f"{loads} sys.exit(gpu is {machine.cpu})"]),
    ]


def tools(machine: Machine) -> list[Call]:
    """llama-batched-bench and a libllama without the series, over the wheel's ggml."""
    calls: list[Call] = []
    sources = [f"-DLIBRARIES={machine.libraries}", f"-DSOURCE={PARTS / 'source' / 'vendor' / 'llama.cpp'}"]
    sources += [f"-DSTOCK={PARTS / 'stock'}", "-DCMAKE_BUILD_TYPE=Release"]
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    for what, folder, target in (
        ("bench", machine.work / "tools", "batched-bench"),
        ("stock", machine.work / "stock-build", "llama"),
    ):
        configure = ["cmake", "-S", str(ROOT / "benchmarks" / "gpu_tools"), "-B", str(folder), *generator]
        calls.append(Call([*configure, *sources, f"-DWHAT={what}"]))
        calls.append(Call(["cmake", "--build", str(folder), "-j", str(os.cpu_count() or 1), "--target", target]))
    code = (
        "import shutil, sys; from pathlib import Path; stock, libraries, built, target = map(Path, sys.argv[1:]);"
        "shutil.rmtree(target, ignore_errors=True); shutil.copytree(stock, target);"
        "shutil.copytree(libraries, target / 'lib'); shutil.copy2(built, target / 'lib' / 'libllama.so')"
    )
    built = machine.work / "stock-build" / "bin" / "libllama.so"
    target = machine.work / "stock" / "llama_cpp"
    parts = [str(PARTS / "stock" / "llama_cpp"), str(machine.libraries), str(built), str(target)]
    calls.append(Call([sys.executable, "-c", code, *parts]))
    return calls


def proof(machine: Machine) -> list[Call]:
    """The oracle, independent rows, off = on = stock."""
    command = [sys.executable, str(ROOT / "benchmarks" / "native_proof.py")]
    if (machine.work / "stock" / "llama_cpp" / "lib" / "libllama.so").exists():
        command += ["--stock", str(machine.work / "stock")]
    if machine.cpu:
        command += ["--only", "llama-f32", "llama-q4_k", "qwen3moe", "mamba"]
    elif not machine.everything:
        command += ["--kinds"]
    return [Call(command)]


def replay(machine: Machine) -> list[Call]:
    """CUDA graphs and fusion, as they are and with each of them turned off."""
    command = _step(machine, "replay")
    switches = ({}, {"GGML_CUDA_DISABLE_GRAPHS": "1"}, {"GGML_CUDA_DISABLE_FUSION": "1"})
    return [Call(command, dict(switch)) for switch in switches]


def _step(machine: Machine, name: str, *arguments: str) -> list[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_steps.py"), name, *arguments]
    return command + (["--cpu"] if machine.cpu else [])


def generate(machine: Machine) -> list[Call]:
    layers = "0" if machine.cpu else "-1"
    command = [sys.executable, str(ROOT / "cli.py"), "generate", "Tell me a story about a fox.", "--json"]
    command += ["--n-gpu-layers", layers, "--budget", "32", "--rows", "16", "--max-tokens", "48", "--seed", "1"]
    return [Call(command)]


def chat(machine: Machine) -> list[Call]:
    layers = "0" if machine.cpu else "-1"
    command = [sys.executable, str(ROOT / "cli.py"), "chat", "--n-gpu-layers", layers, "--max-tokens", "48"]
    return [Call(command, stdin="Tell me a story about a fox.\n/why\n/base\nAnd then?\n/quit\n")]


def model(machine: Machine) -> list[Call]:
    return [Call(_step(machine, "model", str(machine.model)))]


def speed(machine: Machine) -> list[Call]:
    """Item 1, against llama-batched-bench and a raw loop."""
    return [Call(_step(machine, "speed", str(machine.model), str(machine.bench), *machine.rows))]


def methods(machine: Machine) -> list[Call]:
    """Item 2, and where the time goes."""
    return [Call(_step(machine, "methods", str(machine.model), *machine.rows))]


def torch(machine: Machine) -> list[Call]:
    """Item 3."""
    command = [sys.executable, str(ROOT / "benchmarks" / "torch_aisp.py"), "-m", str(machine.model)]
    command += ["--rows", *machine.rows, "--static", "--device", "cpu" if machine.cpu else "cuda"]
    command += ["--prompt", "16" if machine.cpu else "128", "--tokens", "8" if machine.cpu else "64"]
    return [Call([*command, "--repeats", "1" if machine.cpu else "3"])]


def samplers(machine: Machine) -> list[Call]:
    """Where a token is best chosen."""
    command = [sys.executable, str(ROOT / "benchmarks" / "samplers.py"), "-m", str(machine.model)]
    command += ["--rows", *machine.rows, "--n-gpu-layers", "0" if machine.cpu else "-1"]
    return [Call([*command, "--steps", "16", "--repeats", "1" if machine.cpu else "5"])]


def growth(machine: Machine) -> list[Call]:
    """Item 5."""
    return [Call(_step(machine, "growth"))]


def memory(machine: Machine) -> list[Call]:
    """Item 5, of the GPU, the reward on it too."""
    return [Call(_step(machine, "memory", str(machine.model), n)) for n in machine.rows]


STEPS: dict[str, Callable[[Machine], list[Call]]] = {
    step.__name__: step
    for step in (
        prepare,
        build,
        tools,
        proof,
        replay,
        generate,
        chat,
        model,
        speed,
        methods,
        torch,
        samplers,
        growth,
        memory,
    )
}


def execute(name: str, machine: Machine) -> dict[str, Any]:
    """Run a step's commands until one fails or time is up; what it found."""
    log = machine.work / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    code, found = 0, []
    try:
        with log.open("wb") as file:
            for call in STEPS[name](machine):
                file.write(f"$ {' '.join(call.command)}\n".encode())
                file.flush()
                begin = file.tell()
                left = machine.limit - (time.monotonic() - start)
                code = _run(call, machine.environment() | call.changes, file, left)
                file.flush()
                found += _json_lines(log, begin)
                if code:
                    break
    except Exception as error:  # whatever it is, the other steps go on
        code, text = -1, f"{type(error).__name__}: {error}"
        with log.open("ab") as file:
            file.write(f"\n{text}\n".encode())
    result: dict[str, Any] = {"ok": code == 0, "code": code, "seconds": round(time.monotonic() - start, 1)}
    if code:
        result["tail"] = log.read_text("utf-8", "replace").strip().splitlines()[-12:]
    if name in ("generate", "chat"):
        result["said"] = log.read_text("utf-8", "replace").split("\n", 1)[-1].strip()[:2000]
    return result | {"found": found}


def _run(call: Call, environment: dict[str, str], log: Any, limit: float) -> int:
    """The exit code of a command; 124 if it ran too long: then it and its children are killed."""
    process = subprocess.Popen(
        call.command,
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
    )
    try:
        process.communicate(call.stdin.encode(), timeout=max(1.0, limit))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        log.write(b"\nthe time limit is over\n")
        return 124
    except KeyboardInterrupt:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode


def _json_lines(log: Path, begin: int) -> list[Any]:
    """The JSON objects that a command printed, one a line; all before it was killed too."""
    with log.open("rb") as file:
        file.seek(begin)
        lines = file.read().decode("utf-8", "replace").splitlines()
    found = []
    for line in lines:
        if line.startswith("{") and line.endswith("}"):
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
    return found


def report(result: dict[str, Any]) -> str:
    """For people."""
    lines = ["# GPU run" if result["machine"].get("gpu") else "# Run without a GPU", ""]
    lines += [f"- {key}: {value}" for key, value in result["machine"].items()]
    lines += ["", "| step | result | seconds |", "|---|---|---|"]
    for name, step in result["steps"].items():
        ok = "ok" if step["ok"] else "time limit" if step["code"] == 124 else f"FAILED ({step['code']})"
        lines.append(f"| {name} | {ok} | {step['seconds']:.0f} |")
    reached = goals(result["steps"])
    if reached and result["machine"].get("gpu"):
        lines += ["", "## Goals", "", *reached]
    for name, step in result["steps"].items():
        lines += ["", f"## {name}", ""]
        tables = [table for found in step["found"] for table in found.get("tables", [])]
        for table in tables:
            lines += [f"{table['title']}", "", "| " + " | ".join(table["columns"]) + " |"]
            lines += ["|" + "---|" * len(table["columns"])]
            lines += ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in table["rows"]] + [""]
        if name == "torch":
            lines += _torch_lines(step["found"])
        if name == "proof":
            lines += _proof_lines(step["found"])
        elif name == "replay":
            lines += _replay_lines(step["found"])
        if "said" in step:
            lines += ["```", step["said"], "```"]
        if "tail" in step:
            lines += ["```", *step["tail"], "```"]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"
    return str(value)


def _proof_lines(found: list[Any]) -> list[str]:
    lines = ["| model | error | base error | as promised | as stock |", "|---|---|---|---|---|"]
    for model_ in (model_ for part in found for model_ in part.get("models", [])):
        ok = "yes" if model_["ok"] else "NO"
        lines.append(
            f"| {model_['model']} | {model_['error']:.1e} | {model_['base_error']:.1e} | {ok} | {model_['as_stock']} |"
        )
    return lines


def _torch_lines(found: list[Any]) -> list[str]:
    lines = [
        "| n | prompt | new | aisp-local, s (tokens) | PyTorch, s (tokens, agreement) | best over ours (quartiles) |"
    ]
    lines += ["|---|---|---|---|---|---|"]
    for r in (r for part in found for r in part.get("results", [])):
        seconds, decoded = r["seconds"], r["decoded"]
        sides = [f"{name} {seconds[name]:.2f} ({decoded[name]}, {share:.2f})" for name, share in r["agreement"].items()]
        middle, low, high = r["ratio"]
        ours = f"{seconds['aisp-local']:.2f} ({decoded['ours']})"
        cells = [r["n"], r["prompt"], r["tokens"], ours, ", ".join(sides)]
        lines.append("| " + " | ".join(map(str, cells)) + f" | {middle:.2f} ({low:.2f} to {high:.2f}) |")
    return lines


def goals(steps: dict[str, Any]) -> list[str]:
    """What was aimed at, and whether it was reached: the medians of the ratios in the tables."""
    lines = []

    def tables(step: str) -> list[Any]:
        return [table for found in steps.get(step, {}).get("found", []) for table in found.get("tables", [])]

    for table in tables("speed"):
        for name, _, over, _ in table["rows"] if table["name"] == "speed" else []:
            if name.startswith("engine"):
                goal = 0.95 if "greedy" in name else 0.92
                lines.append(_goal(f"{name}, over llama-batched-bench ({table['title']})", over, goal, True))
    for table in tables("methods"):
        for row in table["rows"] if table["name"] == "methods" else []:
            if row[0] in ("aisp", "aisp-held"):
                lines.append(_goal(f"{row[0]}, seconds over best-of-n ({table['title']})", row[2], 1.05, False))
    for r in (r for part in steps.get("torch", {}).get("found", []) for r in part.get("results", [])):
        lines.append(_goal(f"PyTorch's seconds over ours, n = {r['n']}", str(r["ratio"][0]), 3.0, True))
    return lines


def _goal(what: str, found: str, goal: float, least: bool) -> str:
    value = float(found.split()[0])
    met = value >= goal if least else value <= goal
    return f"- {what}: {value:.3f}, {'at least' if least else 'at most'} {goal}: {'met' if met else 'MISSED'}"


def _replay_lines(found: list[Any]) -> list[str]:
    columns = ["model", "switched off", "graph kept by llama.cpp, off / on", "replayed by CUDA, off / on"]
    columns += ["given up by CUDA, off / on", "error", "base error", "as promised"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for part in found:
        for r in part.get("replays", []):
            pairs = [f"{r[key][0]} / {r[key][1]}" for key in ("reused", "replayed", "reset")]
            cells = [r["model"], part["switched_off"], *pairs, f"{r['error']:.1e}", f"{r['base_error']:.1e}"]
            lines.append("| " + " | ".join([*cells, "yes" if r["ok"] else "NO"]) + " |")
    return lines + ["", *(f"- {text}" for part in found for text in part.get("notes", []))]


def check_replays(step: dict[str, Any]) -> list[str]:
    """What the three runs say together: equal bits without graphs, equal error without fusion."""
    runs = {part["switched_off"]: part["replays"] for part in step["found"] if "replays" in part}
    wrong = []
    for plain, other in zip(runs.get("nothing", []), runs.get("graphs", []), strict=False):
        if plain["digest"] != other["digest"]:
            wrong.append(f"{plain['model']}: logits differ between replayed CUDA graphs and single launches")
    for plain, other in zip(runs.get("nothing", []), runs.get("fusion", []), strict=False):
        if plain["error"] > 3 * other["error"] + 1e-6:
            wrong.append(
                f"{plain['model']}: the error is {plain['error']:.1e} with fusion, {other['error']:.1e} without"
            )
    return wrong


def run(machine: Machine, names: Sequence[str]) -> int:
    if not (PARTS / "source").is_dir():
        raise SystemExit("there is no source here: run the gpu.py of an unpacked archive that `gpu.py pack` has made")
    machine.work.mkdir(parents=True, exist_ok=True)
    (machine.work / "tmp").mkdir(exist_ok=True)
    machine.gpu = {} if machine.cpu else graphics_card()
    if not machine.cpu and not machine.architecture:
        if not machine.gpu:
            raise SystemExit("nvidia-smi finds no GPU; give --architecture to build for one, or --cpu")
        machine.architecture = machine.gpu["compute_cap"].replace(".", "")
    path = machine.work / "report.json"
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"steps": {}}
    result["machine"] = {"gpu": machine.gpu, "architecture": machine.architecture, "cores": os.cpu_count()}
    result["machine"] |= {"python": platform.python_version(), "system": platform.platform()}
    failed = False
    for name in names:
        print(f"{name} ...", flush=True)
        step = execute(name, machine)
        if name == "replay":
            step["wrong"] = check_replays(step)
            step["ok"] = step["ok"] and not step["wrong"]
            step["found"].append({"notes": step["wrong"]})
        result["steps"][name] = step
        failed |= not step["ok"]
        print(f"{name}: {'ok' if step['ok'] else 'FAILED'}, {step['seconds']:.0f} s", flush=True)
        for line in step.get("tail", []):
            print(f"    {line}")
        result["steps"] = {each: result["steps"][each] for each in STEPS if each in result["steps"]}
        path.write_text(json.dumps(result, indent=1), encoding="utf-8")
        path.with_suffix(".md").write_text(report(result), encoding="utf-8")
    print(f"{path.with_suffix('.md')}")
    return int(failed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="make the archive")
    packing.add_argument("target", type=Path, nargs="?", default=Path("aisp-gpu.tar.gz"))
    packing.add_argument("--sdist", type=Path, help="the sdist of llama-cpp-python, if it is at hand")
    running = commands.add_parser("run", help="build, prove, measure")
    running.add_argument("--only", help=f"some of {','.join(STEPS)}")
    running.add_argument("--cpu", action="store_true", help="without CUDA, in small sizes: does the script work?")
    running.add_argument("--architecture", default="", help="of CMAKE_CUDA_ARCHITECTURES; default: the GPU's own")
    running.add_argument("--work", type=Path, default=ROOT / "work", help="where everything is written")
    running.add_argument("--limit", type=float, default=590.0, help="seconds a step may take")
    running.add_argument("--everything", action="store_true", help="prove all architectures, not one of each kind")
    options = parser.parse_args()
    if options.command == "pack":
        pack(options.target, options.sdist)
        return 0
    names = options.only.split(",") if options.only else list(STEPS)
    unknown = sorted(set(names) - set(STEPS))
    if unknown:
        parser.error(f"--only {unknown[0]} is unknown; use {', '.join(STEPS)}")
    machine = Machine(
        options.work.resolve(),
        options.cpu,
        architecture=options.architecture,
        limit=options.limit,
        everything=options.everything,
    )
    return run(machine, names)


if __name__ == "__main__":
    sys.exit(main())
