"""Where a token is best chosen: here in numpy, by llama.cpp's samplers row by row, or by its samplers in the graph.

    python benchmarks/samplers.py [--rows 1 8 32] [--steps 32] [--repeats 7] [--n-gpu-layers N] [-m model.gguf]

The model of `bench speed` with 134 million parameters and 32,000 tokens unless another is given. Each way decodes the
same number of steps from a cache of the same size, in turn in one process; printed is what a step takes beyond decoding
alone, median with quartiles, in milliseconds. One JSON document on the last line.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from aisp_local.bench import synthetic
from aisp_local.bench.raw import RawLoop
from aisp_local.bench.speed import paired
from aisp_local.engine.llama import available_cores
from aisp_local.engine.sampling import pick
from aisp_local.native import Model
from aisp_local.native.binding import binding
from aisp_local.types import GREEDY, Sampling

WAYS = ("decoding alone", "numpy", "llama.cpp, row by row", "llama.cpp, in the graph")
PROMPT = 32


def chain(llama: Any, sampling: Sampling, seed: int) -> Any:
    made = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
    if sampling.greedy:
        llama.llama_sampler_chain_add(made, llama.llama_sampler_init_greedy())
    else:
        llama.llama_sampler_chain_add(made, llama.llama_sampler_init_top_p(sampling.top_p, 1))
        llama.llama_sampler_chain_add(made, llama.llama_sampler_init_temp(sampling.temperature))
        llama.llama_sampler_chain_add(made, llama.llama_sampler_init_dist(seed))
    return made


class Loop:
    """Decodes n rows for some steps and chooses their tokens in one way."""

    def __init__(self, model: Model, n: int, sampling: Sampling, way: str, steps: int, threads: int) -> None:
        self.llama: Any = binding()
        self.n, self.sampling, self.way, self.steps = n, sampling, way, steps
        cells = -(-(PROMPT + n * steps) // 256) * 256
        self.raw = RawLoop(model, rows=n, n_ctx=cells, threads=threads, flash_attention=None)
        self.n_vocab = model.n_vocab
        self.chains = [chain(self.llama, sampling, row) for row in range(n)]
        if way == WAYS[3]:
            for row, sampler in enumerate(self.chains):
                if not self.llama.llama_set_sampler(self.raw.context, row + 1, sampler):
                    raise SystemExit("llama.cpp cannot run this sampler in the graph")

    def choose(self, uniforms: np.ndarray) -> np.ndarray:
        context = self.raw.context
        if self.way == WAYS[1]:
            return pick(self.raw.logits(self.n, self.n_vocab), self.sampling, uniforms)
        if self.way == WAYS[2]:
            sample = self.llama.llama_sampler_sample
            return np.array([sample(made, context, i) for i, made in enumerate(self.chains)], np.int32)
        if self.way == WAYS[3]:
            sampled = self.llama.llama_get_sampled_token_ith
            return np.array([sampled(context, i) for i in range(self.n)], np.int32)
        self.raw.logits(self.n, self.n_vocab)
        return np.zeros(self.n, np.int32)

    def run(self) -> float:
        """Seconds a step."""
        uniforms = np.random.default_rng(0).random((self.steps, self.n))
        self.raw.start(np.arange(PROMPT, dtype=np.int32), self.n)
        tokens = np.zeros(self.n, np.int32)
        begin = time.perf_counter()
        for t in range(self.steps):
            self.raw.step(tokens, PROMPT + t)
            tokens = self.choose(uniforms[t])
        return (time.perf_counter() - begin) / self.steps

    def close(self) -> None:
        if self.way == WAYS[3]:
            for row in range(self.n):
                self.llama.llama_set_sampler(self.raw.context, row + 1, None)
        self.raw.close()
        for made in self.chains:
            self.llama.llama_sampler_free(made)


def measure(model: Model, n: int, sampling: Sampling, options: argparse.Namespace) -> dict[str, list[float]]:
    """Milliseconds a step beyond decoding alone: median and quartiles by way."""
    loops = [Loop(model, n, sampling, way, options.steps, options.threads) for way in WAYS]
    runs: list[Callable[[], float]] = [loop.run for loop in loops]
    seconds = paired(runs, options.repeats)
    for loop in loops:
        loop.close()
    beyond = 1e3 * (seconds[:, 1:] - seconds[:, :1])
    found = {way: np.quantile(beyond[:, i], [0.5, 0.25, 0.75]).tolist() for i, way in enumerate(WAYS[1:])}
    return {WAYS[0]: [1e3 * float(np.median(seconds[:, 0]))], **found}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--n-gpu-layers", type=int, default=0)
    parser.add_argument("-m", "--model", type=Path)
    options = parser.parse_args()
    path = options.model or synthetic.cached(synthetic.Shape())
    model = Model(path, n_gpu_layers=options.n_gpu_layers)
    columns = ["rows", "law", *(f"{'+ ' if i else ''}{way}, ms" for i, way in enumerate(WAYS))]
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    rows = []
    for n in options.rows:
        for name, sampling in (("greedy", GREEDY), ("temperature 0.8, top-p 0.9", Sampling(0.8, top_p=0.9))):
            found = measure(model, n, sampling, options).values()
            spread = [f" ({values[1]:.2f} to {values[2]:.2f})" if values[1:] else "" for values in found]
            rows.append([n, name, *(f"{v[0]:.2f}{quartiles}" for v, quartiles in zip(found, spread, strict=True))])
            print("| " + " | ".join(map(str, rows[-1])) + " |", flush=True)
    title = f"Choosing a token: {path.stem}, {model.n_vocab} tokens, {options.threads} threads"
    print(json.dumps({"tables": [{"name": "samplers", "title": title, "columns": columns, "rows": rows}]}))
    model.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
