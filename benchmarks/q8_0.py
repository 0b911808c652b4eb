"""A decode step of a Q8_0 model with its matrices repacked for the processor (series, patch 8) and as they are.

    python benchmarks/q8_0.py [--rows 1 2 4 8 16 32] [--steps 24] [--repeats 5] [--threads N]

The llama of 134 million parameters, twice in one process, in turn: once as llama.cpp loads it, once with
`use_extra_bufts = false`, which is a stock build's path to the bit. Milliseconds a step, and the median of the paired
ratios with quartiles. One JSON document on the last line.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from raw import Raw  # noqa: E402

from aisp_local.bench import synthetic  # noqa: E402
from aisp_local.bench.speed import paired, ratio  # noqa: E402
from aisp_local.host import available_cores  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=available_cores())
    options = parser.parse_args()
    path = synthetic.cached(synthetic.Shape())
    most = max(options.rows)
    settings = {"n_seq": most, "n_ctx": 256 + most * options.steps, "threads": options.threads}
    print(
        "| rows | as it is, ms a step | repacked, ms a step | as it is over repacked (quartiles) |\n|---|---|---|---|"
    )
    found = []
    with Raw(path, repacked=False, **settings) as plain, Raw(path, **settings) as repacked:
        for n in options.rows:

            def step(raw: Raw, n: int = n) -> float:
                raw.reset()
                rows = list(range(n))
                start = time.perf_counter()
                for t in range(options.steps):
                    raw.decode([5 + t] * n, [t] * n, rows)
                return (time.perf_counter() - start) / options.steps

            seconds = paired([lambda step=step: step(plain), lambda step=step: step(repacked)], options.repeats)
            before, after = 1e3 * np.median(seconds, axis=0)
            middle, low, high = ratio(seconds[:, 0], seconds[:, 1])
            print(f"| {n} | {before:.2f} | {after:.2f} | {middle:.2f} ({low:.2f} to {high:.2f}) |", flush=True)
            found.append({"rows": n, "ms": [before, after], "ratio": [middle, low, high]})
    print(json.dumps({"threads": options.threads, "results": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
