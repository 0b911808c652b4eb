"""Control by callback on a stock llama-cpp-python, and on the patched one, against control in the graph.

    python benchmarks/fallback.py (--stock WHEEL_OR_FOLDER | --build-stock) [--repeats 8] [--threads 1]

The same held controls, greedily, on the shipped model and on that of `bench speed` with 134 million parameters; each
measurement in a process of its own, in turn: control in the graph, by callback on the patched build, by callback on a
stock release. Printed: the median of the paired ratios of decode seconds a token, with quartiles, and how much of the
stock build's responses is the same (its kernels round otherwise). Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from native_proof import build_stock, unpack

from aisp_local import shipped
from aisp_local.bench import synthetic
from aisp_local.bench.tables import paired, ratio

CHILD = """if True:
    import json, sys
    import numpy as np
    from aisp_local.engine import LlamaEngine
    from aisp_local.native.binding import binding, is_patched
    from aisp_local.seeds import RowSeeds
    from aisp_local.types import Controls
    path, control, patched = sys.argv[1:4]
    n, steps, threads = map(int, sys.argv[4:])
    assert is_patched(binding()) == (patched == "patched"), "the wrong llama-cpp-python"
    with LlamaEngine(path, control=control, threads=threads) as engine:
        v = 0.5 * np.random.default_rng(0).standard_normal((n, 1, engine.d), np.float32)
        def roll():
            controls = Controls(n, v, held=True)
            text = "Once upon a time, in a big forest, there lived a fox."
            return engine.rollout(text, controls, max_tokens=steps, seeds=RowSeeds(0))
        roll()
        done = min((roll() for _ in range(3)), key=lambda done: done.decode_seconds)
        print(json.dumps([done.decode_seconds / done.n_tokens, [row.tolist() for row in done.tokens]]))
"""
SIDES = {"graph": ("graph", "patched"), "callback": ("callback", "patched"), "stock": ("callback", "stock")}


def same(a: list[list[int]], b: list[list[int]]) -> float:
    """The mean share of a rollout's tokens before the first that differs."""
    shares = []
    for x, y in zip(a, b, strict=True):
        first = next((i for i, (p, q) in enumerate(zip(x, y, strict=False)) if p != q), min(len(x), len(y)))
        shares.append(first / max(len(x), len(y)))
    return float(np.mean(shares))


def measure(name: str, path: Path, n: int, stock: Path, options: argparse.Namespace) -> dict[str, Any]:
    tokens: dict[str, list[list[int]]] = {}

    def seconds(side: str) -> float:
        places = [str(stock)] if side == "stock" else []
        places += [os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else []
        command = [sys.executable, "-W", "ignore", "-c", CHILD, str(path), *SIDES[side]]
        command += map(str, (n, options.steps, options.threads))
        env = os.environ | {"PYTHONPATH": os.pathsep.join(places)}
        out = subprocess.run(command, env=env, stdout=subprocess.PIPE, check=True).stdout
        each, tokens[side] = json.loads(out)
        return float(each)

    each = paired([lambda side=side: seconds(side) for side in SIDES], options.repeats)
    if tokens["graph"] != tokens["callback"]:
        raise SystemExit(f"{name}, n = {n}: one build gave different tokens by callback and in the graph")
    return {
        "model": name,
        "n": n,
        "step_ms": 1e3 * n * float(np.median(each[:, 0])),
        "callback": ratio(each[:, 1], each[:, 0]),
        "stock": ratio(each[:, 2], each[:, 0]),
        "same": same(tokens["graph"], tokens["stock"]),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--stock", type=Path, help="a wheel of stock llama-cpp-python, or a folder that holds it")
    choice.add_argument("--build-stock", action="store_true", help="build that wheel with pip (minutes, once)")
    parser.add_argument("--steps", type=int, default=32, help="tokens a rollout, at most")
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32], help="rollouts at once")
    parser.add_argument("--only", nargs="+", choices=["3M", "134M"], default=["3M", "134M"])
    options = parser.parse_args()
    paths = {"3M": shipped.model, "134M": lambda: synthetic.cached(synthetic.Shape())}
    found = []
    print("| model | rollouts | step in the graph, ms | callback over graph | stock over graph | stock says the same |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        stock = unpack(build_stock() if options.build_stock else options.stock, Path(scratch))
        for name in options.only:
            path = paths[name]()
            for n in options.rows:
                r = measure(name, path, n, stock, options)
                over = ["{:.3f} ({:.3f} to {:.3f})".format(*r[side]) for side in ("callback", "stock")]
                row = [name, n, f"{r['step_ms']:.2f}", *over, f"{r['same']:.2f}"]
                print("| " + " | ".join(map(str, row)) + " |", flush=True)
                found.append(r)
    print(json.dumps({"threads": options.threads, "steps": options.steps, "results": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
