"""A bare llama_decode loop on a stock build and on the patched one: what patches 8 and 9 give.

    python benchmarks/stock_kernels.py (--stock WHEEL_OR_FOLDER | --build-stock) [--rows 1 8 32 64 128] [--repeats 5]

Rows that share a prompt in one cache, on the shipped model and on that of `bench speed` with 134 million parameters;
each measurement in a process of its own, the two builds in turn. Printed: tokens a second, and the median of the paired
ratios with quartiles. One JSON document on the last line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from native_proof import build_stock, unpack

from aisp_local import shipped
from aisp_local.bench import synthetic
from aisp_local.bench.speed import paired, ratio
from aisp_local.host import available_cores

TESTS = Path(__file__).resolve().parents[1] / "tests"

CHILD = """if True:
    import sys, time
    sys.path.insert(0, sys.argv[1])
    import llama_cpp, numpy as np
    from raw import Raw
    rows, prompt, steps, threads = map(int, sys.argv[3:])
    tokens = np.random.default_rng(0).integers(5, 3000, prompt + steps)
    with Raw(sys.argv[2], n_seq=rows, n_ctx=-(-(prompt + rows * steps) // 256) * 256, threads=threads) as raw:
        def run():
            raw.reset()
            raw.decode(tokens[:prompt], range(prompt), [0] * prompt, [0] * prompt)
            for row in range(1, rows):
                llama_cpp.llama_memory_seq_cp(raw.memory, 0, row, -1, -1)
            start = time.perf_counter()
            for t in range(steps):
                raw.decode([tokens[prompt + t]] * rows, [prompt + t] * rows, range(rows))
            llama_cpp.llama_synchronize(raw.ctx)
            return time.perf_counter() - start
        run()
        print(min(run() for _ in range(3)))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--stock", type=Path, help="a wheel of stock llama-cpp-python, or a folder that holds it")
    choice.add_argument("--build-stock", action="store_true", help="build that wheel with pip (minutes, once)")
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 8, 32, 64, 128])
    parser.add_argument("--prompts", type=int, nargs="*", default=[32, 256])
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=available_cores())
    options = parser.parse_args()
    models = {"storyteller": shipped.model(), "134M Q8_0": synthetic.cached(synthetic.Shape())}
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        stock = unpack(build_stock() if options.build_stock else options.stock, Path(scratch))
        print("| model | prompt | rows | stock, tokens/s | patched, tokens/s | patched over stock (quartiles) |")
        print("|---|---|---|---|---|---|")
        for (name, path), prompt, rows in (
            (model, prompt, rows) for model in models.items() for prompt in options.prompts for rows in options.rows
        ):

            def seconds(folder: Path | None, path: Path = path, prompt: int = prompt, rows: int = rows) -> float:
                sizes = map(str, (rows, prompt, options.steps, options.threads))
                places = [str(folder)] if folder else []
                before = os.environ.get("PYTHONPATH")
                env = os.environ | {"PYTHONPATH": os.pathsep.join([*places, *([before] if before else [])])}
                command = [sys.executable, "-c", CHILD, str(TESTS), str(path), *sizes]
                return float(subprocess.run(command, env=env, stdout=subprocess.PIPE, check=True).stdout)

            taken = paired([lambda f=seconds: f(stock), lambda f=seconds: f(None)], options.repeats)
            a, b = rows * options.steps / np.median(taken, axis=0)
            middle, low, high = ratio(taken[:, 0], taken[:, 1])
            print(
                f"| {name} | {prompt} | {rows} | {a:.0f} | {b:.0f} | {middle:.2f} ({low:.2f} to {high:.2f}) |",
                flush=True,
            )
            found.append(
                {"model": name, "prompt": prompt, "rows": rows, "tokens/s": [a, b], "ratio": [middle, low, high]}
            )
    print(json.dumps({"threads": options.threads, "results": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
