"""Threads, how long they spin, and attention gathered or written out: what the engine's defaults are chosen by.

    python benchmarks/threads.py [--rows 16] [--repeats 5] [--only threads attention] [--models 3M 134M]

On the shipped model and on that of `bench speed` with 134 million parameters. Each setting runs in a process of its own
(an OpenMP runtime reads its environment once), all of them in turn, over and over; printed are tokens a second, medians
with quartiles. "busy": beside as many processes that compute as there are cores. One JSON document on the last line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from aisp_local import shipped
from aisp_local.bench import synthetic
from aisp_local.host import available_cores

CHILD = """if True:
    import sys, time
    from aisp_local.bench.speed import noise, prompt_of
    from aisp_local.engine import LlamaEngine
    from aisp_local.seeds import RowSeeds
    from aisp_local.types import Controls
    path, n, threads, flash = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    flash = {"on": True, "off": False, "default": None}[flash]
    with LlamaEngine(path, threads=threads, flash_attention=flash) as engine:
        text, controls = prompt_of(engine, 32), Controls(n, noise(engine, n, 48))
        def roll(tokens):
            return engine.rollout(text, controls, max_tokens=tokens, seeds=RowSeeds(1))
        roll(4)
        end, tokens, seconds = time.perf_counter() + 1.0, 0, 0.0
        while time.perf_counter() < end:
            done = roll(48)
            tokens, seconds = tokens + done.n_tokens, seconds + done.decode_seconds
        print(tokens / seconds)
"""


def tokens_a_second(path: Path, n: int, threads: int, flash: str, environment: dict[str, str]) -> float:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("GOMP_", "OMP_"))}
    command = [sys.executable, "-c", CHILD, str(path), str(n), str(threads), flash]
    out = subprocess.run(command, env=clean | environment, stdout=subprocess.PIPE, check=True)
    return float(out.stdout)


@contextmanager
def load(busy: bool) -> Iterator[None]:
    code = "while True: pass"
    running = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(available_cores() if busy else 0)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def cell(values: list[float]) -> str:
    middle, low, high = np.quantile(values, [0.5, 0.25, 0.75])
    return f"{middle:.0f} ({low:.0f} to {high:.0f})"


def table(head: str, settings: dict[str, dict[str, Any]], columns: dict[str, dict[str, Any]], repeats: int) -> Any:
    """Every setting in every column, in turn; printed, and as numbers."""
    found: dict[tuple[str, str], list[float]] = {}
    for repeat in range(repeats):
        for column, where in columns.items():
            with load(where.get("busy", False)):
                for name in settings if repeat % 2 else reversed(settings):
                    options = {"threads": available_cores(), "flash": "default", "environment": {}} | settings[name]
                    value = tokens_a_second(where["path"], where["n"], **options)
                    found.setdefault((name, column), []).append(value)
    print(f"| {head} | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for name in settings:
        print(f"| {name} | " + " | ".join(cell(found[name, column]) for column in columns) + " |")
    print(flush=True)
    return [{"setting": name, "column": column, "tokens/s": values} for (name, column), values in found.items()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=["threads", "attention"], choices=["threads", "attention"])
    parser.add_argument("--models", nargs="+", default=["3M", "134M"], choices=["3M", "134M"])
    options = parser.parse_args()
    paths = {"3M": shipped.model, "134M": lambda: synthetic.cached(synthetic.Shape())}
    models = {name: paths[name]() for name in options.models}
    cores, results = available_cores(), {}
    if "threads" in options.only:
        spin = {"GNU's own": {}, "0": {"GOMP_SPINCOUNT": "0"}, "3000": {"GOMP_SPINCOUNT": "3000"}}
        spin |= {"active": {"OMP_WAIT_POLICY": "active"}}
        settings: dict[str, dict[str, Any]] = {
            f"{cores} threads (one a core), spin {name}": {"environment": environment}
            for name, environment in spin.items()
        }
        settings["1 thread"] = {"threads": 1}
        settings["4 threads (llama.cpp's default)"] = {"threads": 4}
        columns = {
            f"{name}, {'busy' if busy else 'idle'}": {"path": path, "n": options.rows, "busy": busy}
            for name, path in models.items()
            for busy in (False, True)
        }
        results["threads"] = table(f"{options.rows} rollouts, tokens/s", settings, columns, options.repeats)
    if "attention" in options.only:
        columns = {f"{name}, {n}": {"path": path, "n": n} for name, path in models.items() for n in (1, 8, 32, 64)}
        names = {
            "on": "gathered cells (flash attention, patch 9)",
            "off": "written out",
            "default": "llama.cpp's choice",
        }
        settings = {name: {"flash": flash} for flash, name in names.items()}
        results["attention"] = table("model, rollouts; tokens/s", settings, columns, options.repeats)
    print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
