"""Price of control by callback (a stock llama-cpp-python) against control in the graph (the patched one).

    python benchmarks/fallback.py [--repeats 8] [--threads 1]

One process and one patched build, which can do both: the same held controls and the same tokens, in turn, on the
shipped model and on a llama of 134M parameters in Q8_0. Median over the pairs of the ratio of decode seconds, with
quartiles. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import synthetic  # noqa: E402

from aisp_local import shipped  # noqa: E402
from aisp_local.engine import LlamaEngine  # noqa: E402
from aisp_local.seeds import RowSeeds  # noqa: E402
from aisp_local.types import Controls  # noqa: E402

PROMPT = "Once upon a time, in a big forest, there lived a fox."


def measure(name: str, path: Path, n: int, steps: int, repeats: int, threads: int) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {"graph": [], "callback": []}
    with (
        LlamaEngine(path, control="graph", threads=threads) as graph,
        LlamaEngine(path, control="callback", threads=threads) as callback,
    ):
        v = 0.5 * np.random.default_rng(0).standard_normal((n, 1, graph.d), np.float32)
        texts = {}
        for repeat in range(repeats + 1):
            for kind, engine in (("graph", graph), ("callback", callback))[:: 1 if repeat % 2 else -1]:
                done = engine.rollout(PROMPT, Controls(n, v, held=True), max_tokens=steps, seeds=RowSeeds(0))
                texts[kind] = [list(tokens) for tokens in done.tokens]
                if repeat:  # the first fills caches
                    seconds[kind].append(done.decode_seconds)
    if texts["graph"] != texts["callback"]:
        raise SystemExit(f"{name}, n = {n}: the two gave different tokens")
    low, ratio, high = np.quantile(np.divide(seconds["callback"], seconds["graph"]), [0.25, 0.5, 0.75])
    step_ms = 1e3 * float(np.median(seconds["graph"])) / max(map(len, texts["graph"]))
    return {"model": name, "n": n, "step_ms": step_ms, "ratio": ratio, "q1": low, "q3": high, "pairs": repeats}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=32, help="tokens a rollout, at most")
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32], help="rollouts at once")
    options = parser.parse_args()
    models = {"storyteller, 3M": shipped.model(), "llama, 134M": synthetic.cached_large()}
    results = [
        measure(name, path, n, options.steps, options.repeats, options.threads)
        for name, path in models.items()
        for n in options.rows
    ]
    print("| model | rollouts | step in the graph, ms | callback over graph | pairs |")
    print("|---|---|---|---|---|")
    for r in results:
        ratio = f"{r['ratio']:.3f} ({r['q1']:.3f} to {r['q3']:.3f})"
        print(f"| {r['model']} | {r['n']} | {r['step_ms']:.2f} | {ratio} | {r['pairs']} |")
    print(json.dumps({"threads": options.threads, "steps": options.steps, "results": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
