"""Time of a decode step with a control over that without, on a llama of 134M parameters in Q8_0.

    python benchmarks/decode_step.py [--steps 48] [--repeats 3] [--threads 1]

The same process, the same tokens and the same cache: after every step the cache is rolled back and the step
is decoded again in the next state (none, trajectory, held; the order rotates), so that a busy machine
slows all of them. A ratio is the median over the steps of the paired ratios, followed by the quartiles;
the noise column is the ratio of two uncontrolled decodes. CPU time leaves out the time in which other
processes ran; it means most with one thread, as threads that wait for each other spin. Last line: one
JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import llama_cpp as C  # noqa: E402
import synthetic  # noqa: E402
from raw import Array, Raw  # noqa: E402

STATES = ("none", "none-again", "trajectory", "held")
CLOCKS = ("wall", "cpu")
PROMPT = 16


def set_state(raw: Raw, state: str, v: Array) -> None:
    raw.clear_control()
    for row, vectors in enumerate(v):
        if state == "trajectory":
            raw.set_control(row, vectors, p0=PROMPT)
        elif state == "held":
            raw.set_control(row, vectors[:1], p0=PROMPT, hold=True)


def measure(path: Path, n: int, steps: int, repeats: int, threads: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    times: dict[str, list[tuple[float, float]]] = {state: [] for state in STATES}
    with Raw(path, n_seq=n, n_ctx=(PROMPT + steps) * n + 256, threads=threads) as raw:
        if raw.init_control(steps) != 0:
            raise SystemExit("llama_init_control failed")
        v = rng.standard_normal((n, steps, raw.d), np.float32)
        rows = list(range(n))
        for _ in range(repeats):
            raw.reset()
            raw.decode(rng.integers(0, raw.size, PROMPT), range(PROMPT), [0] * PROMPT, [0] * PROMPT)
            raw.fork(rows[1:])
            for t in range(steps):
                tokens, positions = rng.integers(0, raw.size, n), [PROMPT + t] * n
                for k in range(len(STATES)):
                    state = STATES[(t + k) % len(STATES)]
                    set_state(raw, state, v)
                    # Twice: the first decode after a change builds another graph, which a run does once only.
                    for _ in range(2):
                        for row in rows:
                            C.llama_memory_seq_rm(raw.memory, row, PROMPT + t, -1)
                        start, start_cpu = time.perf_counter(), time.process_time()
                        raw.decode(tokens, positions, rows)
                        C.llama_synchronize(raw.ctx)
                        seconds = time.perf_counter() - start, time.process_time() - start_cpu
                    times[state].append(seconds)
    result: dict[str, Any] = {"n": n, "pairs": len(times["none"])}
    for column, clock in enumerate(CLOCKS):
        base = np.array(times["none"])[:, column]
        result[clock] = {"base_ms": float(np.median(base)) * 1e3}
        for state in STATES[1:]:
            low, middle, high = np.quantile(np.array(times[state])[:, column] / base, [0.25, 0.5, 0.75])
            result[clock][state] = {"ratio": float(middle), "q1": float(low), "q3": float(high)}
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=48, help="decode steps a repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32], help="sequences decoded at once")
    options = parser.parse_args()
    path = synthetic.cached_large()
    results = [measure(path, n, options.steps, options.repeats, options.threads) for n in options.rows]
    print("| n | clock | step without, ms | trajectory | held | noise (without over without) | pairs |")
    print("|---|---|---|---|---|---|---|")
    for result in results:
        for clock in CLOCKS:
            ratios = [result[clock][state] for state in ("trajectory", "held", "none-again")]
            cells = [f"{r['ratio']:.3f} ({r['q1']:.3f} to {r['q3']:.3f})" for r in ratios]
            cells = [str(result["n"]), clock, f"{result[clock]['base_ms']:.2f}", *cells, str(result["pairs"])]
            print("| " + " | ".join(cells) + " |")
    print(json.dumps({"threads": options.threads, "steps": options.steps, "results": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
