"""The steps of gpu.py that need numpy and aisp_local: each prints JSON objects, one a line, as soon as it has them.

    python benchmarks/gpu_steps.py {replay,model,speed,methods,growth,memory} [ARGUMENTS] [--cpu]

On a build with CUDA the engine puts whole models on the GPU by default; with ``--cpu`` sizes are small.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from aisp_local import shipped  # noqa: E402
from aisp_local.bench import machine, synthetic  # noqa: E402
from aisp_local.bench import speed as bench  # noqa: E402
from aisp_local.bench.raw import RawLoop  # noqa: E402
from aisp_local.engine import LlamaEngine  # noqa: E402
from aisp_local.native.binding import binding, ggml_library  # noqa: E402
from aisp_local.rewards import load_reward  # noqa: E402
from aisp_local.seeds import RowSeeds  # noqa: E402
from aisp_local.types import GREEDY, Controls  # noqa: E402

SMALL = synthetic.Shape(4000, 512, 4, 8, 1024, 2048, kv_heads=4, kind="Q4_K_M")
HEADS_128 = synthetic.Shape(2000, 512, 4, 4, 1024, 1024, kv_heads=2, kind="Q4_K_M")
"""Heads as wide as those of large models, which take the flash attention that small ones do not."""


def say(**values: Any) -> None:
    print(json.dumps(values), flush=True)


def say_table(table: bench.Table) -> None:
    say(tables=[{"name": table.name, "title": table.title, "columns": list(table.columns), "rows": table.rows}])


def replay(_: Sequence[str], cpu: bool) -> bool:
    """Graph replay with and without a control, and on a GPU which kernels a control adds."""
    with contextlib.suppress(ImportError):
        import torch  # noqa: F401 (before llama.cpp: then both take the CUDA libraries that PyTorch was built with)
    import proof
    import synthetic as made

    off = [name for name in ("graphs", "fusion") if os.environ.get(f"GGML_CUDA_DISABLE_{name.upper()}")]
    replays, notes, ok = [], [], True
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        names = ("llama-f16", "llama-q4_k") if cpu else ("llama-f32", "llama-f16", "llama-q4_k", "qwen3-tied", "mamba")
        paths = [made.write_architecture(folder, name) for name in names]
        paths.append(synthetic.write(folder / "llama-heads-128.gguf", HEADS_128))
        for path in paths:
            result = proof.replay(path)
            ok &= result.ok
            if not cpu and not off and result.replayed[1] == 0:
                ok = False
                notes.append(f"{path.stem}: no CUDA graph was replayed")
            replays.append(asdict(result) | {"ok": result.ok})
        if not cpu and not off:
            try:
                said, same = kernels(paths[-1])
            except Exception as error:  # PyTorch is a guest here
                said, same = [f"kernels not counted: {type(error).__name__}: {error}"], True
            notes += said
            ok &= same
    say(switched_off=off[0] if off else "nothing", replays=replays, notes=notes)
    return ok


def kernels(path: Path, rows: int = 4, steps: int = 8) -> tuple[list[str], bool]:
    """Which CUDA kernels a step has more under a control; PyTorch's profiler sees those of the whole process.

    Fusion is kept if these are none but one that gathers rows and one that adds, and no kernel is missing.
    """
    import torch
    from raw import Raw
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.init()
    counts: list[Counter[str]] = []
    with Raw(path, n_seq=rows) as raw:
        raw.init_control(1)
        for control in (False, True):
            raw.reset()
            raw.decode(range(4), range(4), [0] * 4, [0] * 4)
            raw.fork(range(1, rows))
            for i in range(rows if control else 0):
                raw.set_control(i, np.ones((1, raw.d), np.float32), p0=0, hold=True)
            for t in range(4):  # until CUDA replays a graph
                raw.decode([1] * rows, [4 + t] * rows, range(rows))
            raw.logits(0)
            with profile(activities=[ProfilerActivity.CUDA]) as profiler:
                for t in range(steps):
                    raw.decode([1] * rows, [8 + t] * rows, range(rows))
                raw.logits(0)
            events = [event for event in profiler.events() or [] if event.device_type == DeviceType.CUDA]
            counts.append(Counter(event.name for event in events if not event.name.startswith("Mem")))
    off, on = counts
    if not off:
        return ["kernels not counted: the profiler saw none"], True
    differs = {name: (on[name] - off[name]) / steps for name in {*off, *on} if on[name] != off[name]}
    total = sum(on.values()) / steps, sum(off.values()) / steps
    notes = [f"kernels a step: {total[1]:g} without, {total[0]:g} with a control"]
    notes += [f"{count:+g} {name[:100]}" for name, count in sorted(differs.items())]
    return notes, all(count > 0 for count in differs.values()) and total[0] - total[1] <= 2


def model(arguments: Sequence[str], cpu: bool) -> bool:
    path = Path(arguments[0])
    if not path.exists():
        part = path.with_suffix(".part")
        synthetic.write(part, SMALL if cpu else synthetic.LLAMA_8B)
        part.rename(path)
    say(model=path.name, bytes=path.stat().st_size)
    return True


def batched_bench(program: Path, path: Path, n: int, prompt: int, tokens: int, engine: LlamaEngine) -> float:
    """Seconds of llama-batched-bench for ``tokens`` steps of n rows, in a cache as large as the engine's."""
    settings = engine.settings
    command = [str(program), "-m", str(path), "-npp", str(prompt), "-ntg", str(tokens), "-npl", str(n), "-pps", "-kvu"]
    command += ["-c", str(settings["n_ctx"]), "-b", "512", "-ub", "512", "-t", str(settings["threads"])]
    command += ["-ngl", "99" if engine.model.on_gpu else "0", "--output-format", "jsonl"]
    if settings["flash_attention"] is not None:
        command += ["-fa", "on" if settings["flash_attention"] else "off"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise SystemExit(f"llama-batched-bench failed ({done.returncode}): {done.stderr[-2000:]}")
    return float(json.loads(lines[-1])["t_tg"])


def speed(arguments: Sequence[str], cpu: bool) -> bool:
    """Item 1: the engine under a control against llama-batched-bench and against a raw loop, in turn."""
    path, program, rows = Path(arguments[0]), Path(arguments[1]), [int(n) for n in arguments[2:]]
    prompt, tokens, repeats = (16, 8, 1) if cpu else (128, 64, 3)
    ceiling(path, rows, prompt, tokens)
    for n in rows:
        table = bench.Table(
            "speed",
            f"{path.stem}, {n} rollouts, prompt {prompt}, {tokens} new tokens: decoding alone",
            ["what", "tokens/s", "over llama-batched-bench (quartiles)", "over the raw loop (quartiles)"],
        )
        with LlamaEngine(path) as engine:
            text = bench.prompt_of(engine, prompt)
            ids = engine.tokens(text)
            vectors = bench.noise(engine, n, tokens)

            def roll(controls: Controls) -> float:
                done = engine.rollout(text, controls, max_tokens=tokens, seeds=RowSeeds(1))  # noqa: B023
                return done.decode_seconds / done.n_tokens

            greedy = Controls(n, vectors, sampling=GREEDY)
            warm = Controls(n, vectors, sampling=bench.WARM)
            done = engine.rollout(text, greedy, max_tokens=tokens, seeds=RowSeeds(1))
            raw = RawLoop(engine.model, rows=n, **engine.settings)
            names = [
                "llama-batched-bench",
                "raw llama_decode loop",
                "engine, greedy",
                "engine, temperature 0.8, top-p 0.9",
            ]
            runs: list[Callable[[], float]] = [
                lambda: batched_bench(program, path, n, len(ids), tokens, engine) / (n * tokens),  # noqa: B023
                lambda: raw.replay(ids, done.tokens) / done.n_tokens,  # noqa: B023
                lambda: roll(greedy),  # noqa: B023
                lambda: roll(warm),  # noqa: B023
            ]
            seconds = bench.paired(runs, repeats)
            raw.close()
        for i, name in enumerate(names):
            over = [_spread(bench.ratio(seconds[:, base], seconds[:, i])) for base in (0, 1)]
            table.rows.append([name, 1 / float(np.median(seconds[:, i])), *over])
        say_table(table)
    return True


def _spread(values: Sequence[float]) -> str:
    return f"{values[0]:.3f} ({values[1]:.3f} to {values[2]:.3f})"


def ceiling(path: Path, rows: Sequence[int], prompt: int, tokens: int) -> None:
    """The fastest that a step could be by the memory's bandwidth, the GPU's as PyTorch reads it."""
    bandwidth, where = gpu_bandwidth(), "GPU"
    if bandwidth is None:
        bandwidth, where = machine.memory_bandwidth(os.cpu_count() or 1), "host"
    table = bench.Table(
        "ceiling",
        f"Ceiling: {bandwidth / 2**30:.0f} GiB/s are read ({where})",
        ["rollouts", "MiB read a step", "tokens/s by memory"],
    )
    with LlamaEngine(path) as engine:
        read = weights_on_gpu(path)
        for n in rows:
            step = read + engine.model.kv_bytes_per_token * (prompt + n * tokens // 2)
            table.rows.append([n, step / 2**20, n * bandwidth / step])
    say_table(table)


def gpu_bandwidth(size: int = 2**32) -> float | None:
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    data = torch.ones(size // 4, device="cuda")
    best = 0.0
    for _ in range(5):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        data.max()
        end.record()
        torch.cuda.synchronize()
        best = max(best, size / (begin.elapsed_time(end) / 1e3))
    del data
    torch.cuda.empty_cache()
    return best


def methods(arguments: Sequence[str], cpu: bool) -> bool:
    """Item 2: searches against best-of-n with equal samples, reward and update included."""
    path = Path(arguments[0])
    for n in map(int, arguments[1:]):
        # Exact KL takes a product with the output matrix on the host at each step: minutes on a large model.
        for table in bench.methods(path, n, 2, 8 if cpu else 64, 1 if cpu else 2, kl=False):
            say_table(table)
    return True


def growth(_: Sequence[str], cpu: bool) -> bool:
    """Item 5: what each size costs, on small models."""
    shape = synthetic.Shape(2000, 256, 2, 4, 512) if cpu else synthetic.Shape()
    for table in bench.growth(shape, 8 if cpu else 64, 1 if cpu else 3, bench.QUICK if cpu else None):
        say_table(table)
    return True


def weights_on_gpu(path: Path) -> int:
    """Bytes of a model's weights without the embedding, which stays on the host where there is an output matrix."""
    from gguf import GGUFReader

    tensors = {tensor.name: int(tensor.n_bytes) for tensor in GGUFReader(path).tensors}
    total = sum(tensors.values())
    return total - tensors["token_embd.weight"] if "output.weight" in tensors else total


def planned_memory(engine: LlamaEngine, path: Path, rows: int, tokens: int) -> dict[str, int]:
    """Bytes by the formula of docs/gpu.md, of the buffers as llama.cpp calls them; compute buffers are not planned."""
    return {
        "model": weights_on_gpu(path),
        "KV": engine.settings["n_ctx"] * engine.model.kv_bytes_per_token,
        # A trajectory for each row, for the prompt's sequence and for the shared mean, and a row of zeros.
        "control trajectory": 4 * engine.d * (1 + (rows + 2) * tokens),
    }


class Device:
    """Free memory of the GPU as ggml reports it; of the host without one."""

    def __init__(self) -> None:
        lib: Any = ggml_library()
        lib.ggml_backend_dev_by_type.restype = ctypes.c_void_p
        lib.ggml_backend_dev_by_type.argtypes = [ctypes.c_int]
        size = ctypes.POINTER(ctypes.c_size_t)
        lib.ggml_backend_dev_memory.restype, lib.ggml_backend_dev_memory.argtypes = None, [ctypes.c_void_p, size, size]
        self._lib, self._device = lib, lib.ggml_backend_dev_by_type(1)  # GGML_BACKEND_DEVICE_TYPE_GPU
        self.found = bool(self._device)

    def used(self) -> int:
        if not self.found:
            return machine.resident()
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._lib.ggml_backend_dev_memory(self._device, ctypes.byref(free), ctypes.byref(total))
        return total.value - free.value


_BUFFER = re.compile(r"(\S+) +(model|KV|control trajectory|compute) buffer size = +([\d.]+) MiB")


def buffers(lines: Sequence[str], gpu: bool) -> dict[str, float]:
    """MiB of each kind of buffer on the GPU, or on the host without one, from llama.cpp's log."""
    found: dict[tuple[str, str], float] = {}
    for match in filter(None, map(_BUFFER.search, lines)):
        place, kind, size = match.groups()
        if place.startswith("CUDA") == gpu and not place.endswith("_Host"):
            found[place, kind] = float(size)  # what is made anew counts once
    sums: Counter[str] = Counter()
    for (_, kind), size in found.items():
        sums[kind] += size
    return dict(sums)


def memory(arguments: Sequence[str], cpu: bool) -> bool:
    """Item 5: what n rollouts and the reward take on the same GPU, planned, allocated, and found by the driver."""
    path, n = Path(arguments[0]), int(arguments[1])
    prompt, tokens = (16, 8) if cpu else (128, 256)
    folder, llama, said = shipped.reward(), binding(), []
    log = llama.llama_log_callback(lambda _level, text, _data: said.append(text.decode("utf-8", "replace")))
    llama.llama_log_set(log, ctypes.c_void_p(0))
    device = Device()
    used = [device.used()]
    with LlamaEngine(path) as engine:
        text = bench.prompt_of(engine, prompt)
        controls = Controls(n, bench.noise(engine, n, tokens))
        texts = engine.rollout(text, controls, max_tokens=tokens, seeds=RowSeeds(1)).texts
        used.append(device.used())
        planned = planned_memory(engine, path, n, tokens)
        reward = load_reward(folder)
        reward.score(text, texts)
        used.append(device.used())
    where = "the GPU" if device.found else "the host (no GPU)"
    provider = getattr(reward, "provider", "none")
    table = bench.Table(
        "memory",
        f"Memory of {where}: {path.stem}, {n} rollouts of {tokens} tokens, reward by {provider}",
        ["part", "MiB planned", "MiB allocated"],
    )
    allocated = buffers(said, device.found)
    table.rows.extend([part, size / 2**20, allocated.get(part, 0.0)] for part, size in planned.items())
    compute = allocated.get("compute", 0.0)
    total = sum(planned.values()) / 2**20 + compute
    table.rows.append(["compute (taken from the log)", compute, compute])
    table.rows.append(["all of these, and by the driver", total, (used[1] - used[0]) / 2**20])
    size = sum(file.stat().st_size for file in folder.glob("*.onnx*"))
    table.rows.append(["reward: its file, and by the driver", size / 2**20, (used[2] - used[1]) / 2**20])
    table.rows.append(["CUDA itself, by the driver", "", used[0] / 2**20])
    say_table(table)
    return device.found or cpu


STEPS = {step.__name__: step for step in (replay, model, speed, methods, growth, memory)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("arguments", nargs="*")
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args()
    return 0 if STEPS[options.step](options.arguments, options.cpu) else 1


if __name__ == "__main__":
    sys.exit(main())
