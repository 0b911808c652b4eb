"""Where a token is best chosen: in numpy, by the patched llama.cpp for all rows at once, by llama.cpp's samplers row by
row, or by its samplers in the graph.

    python benchmarks/samplers.py [--rows 1 8 32] [--steps 32] [--repeats 7] [--n-gpu-layers N] [-m model.gguf]

The model of `bench speed` with 134 million parameters and 32,000 tokens unless another is given. Each way decodes the
same number of steps from a cache of the same size, in turn in one process; printed is what a step takes beyond decoding
alone, median with quartiles, in milliseconds. Then the parts of the engine's own step beyond decoding, in microseconds,
each beside the time that its bytes take to be read once. One JSON document on the last line.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from aisp_local.bench import synthetic
from aisp_local.bench.raw import RawLoop
from aisp_local.bench.speed import WARM, paired, prompt_of
from aisp_local.engine import LlamaEngine, decode
from aisp_local.engine.sampling import pick, picker
from aisp_local.host import available_cores
from aisp_local.native import Context, Model, can_sample_rows, sample_rows
from aisp_local.native.binding import binding
from aisp_local.seeds import RowSeeds
from aisp_local.timeline import Timeline
from aisp_local.types import GREEDY, Controls, Sampling

ALONE, NUMPY, AT_ONCE, BY_ROW, IN_GRAPH = (
    "decoding alone",
    "numpy",
    "llama.cpp, all rows at once",
    "llama.cpp, row by row",
    "llama.cpp, in the graph",
)
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
        if way == IN_GRAPH:
            for row, sampler in enumerate(self.chains):
                if not self.llama.llama_set_sampler(self.raw.context, row + 1, sampler):
                    raise SystemExit("llama.cpp cannot run this sampler in the graph")

    def choose(self, uniforms: np.ndarray) -> np.ndarray:
        context = self.raw.context
        if self.way == NUMPY:
            return pick(self.raw.logits(self.n, self.n_vocab), self.sampling, uniforms)
        if self.way == AT_ONCE:
            return sample_rows(self.raw.logits(self.n, self.n_vocab), self.sampling, uniforms)
        if self.way == BY_ROW:
            sample = self.llama.llama_sampler_sample
            return np.array([sample(made, context, i) for i, made in enumerate(self.chains)], np.int32)
        if self.way == IN_GRAPH:
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
        if self.way == IN_GRAPH:
            for row in range(self.n):
                self.llama.llama_set_sampler(self.raw.context, row + 1, None)
        self.raw.close()
        for made in self.chains:
            self.llama.llama_sampler_free(made)


def measure(
    model: Model, n: int, sampling: Sampling, ways: Sequence[str], options: argparse.Namespace
) -> dict[str, list[float]]:
    """Milliseconds a step beyond decoding alone, which comes first: median and quartiles by way."""
    # The kernel leaves the largest logit to numpy.
    ways = [way for way in ways if not (sampling.greedy and way == AT_ONCE)]
    loops = [Loop(model, n, sampling, way, options.steps, options.threads) for way in ways]
    runs: list[Callable[[], float]] = [loop.run for loop in loops]
    seconds = paired(runs, options.repeats)
    for loop in loops:
        loop.close()
    beyond = 1e3 * (seconds[:, 1:] - seconds[:, :1])
    found = {way: np.quantile(beyond[:, i], [0.5, 0.25, 0.75]).tolist() for i, way in enumerate(ways[1:])}
    return {ALONE: [1e3 * float(np.median(seconds[:, 0]))], **found}


class Parts:
    """Seconds that calls took, by name."""

    def __init__(self) -> None:
        self.seconds = {"logits": 0.0, "draw": 0.0}

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            begin = time.perf_counter()
            try:
                return call(*arguments)
            finally:
                self.seconds[name] += time.perf_counter() - begin

        return run


def read_speed(logits: np.ndarray) -> float:
    """Bytes a second at which numpy finds the largest value of such rows, the best of many times."""
    seconds = []
    for _ in range(50):
        begin = time.perf_counter()
        logits.max(axis=1)
        seconds.append(time.perf_counter() - begin)
    return logits.nbytes / min(seconds)


def split(engine: LlamaEngine, n: int, steps: int, repeats: int) -> list[list[Any]]:
    """Of one step with temperature and top-p: part, microseconds, bytes read, microseconds to read them once."""
    prompt, controls, seeds = prompt_of(engine, PROMPT), Controls(n, sampling=WARM), RowSeeds(1)
    found = []
    for _ in range(repeats + 1):
        parts, line = Parts(), Timeline()
        with (
            mock.patch.object(Context, "logits", parts.timed("logits", Context.logits)),
            mock.patch.object(
                decode,
                "picker",
                lambda: parts.timed("draw", picker()),  # noqa: B023
            ),
        ):
            engine.timeline = line
            out = engine.rollout(prompt, controls, max_tokens=steps, seeds=seeds)
        taken = max(map(len, out.tokens))
        begin = time.perf_counter()
        for row in range(n):
            seeds.generator(row, "sampling").random(steps)
        numbers = time.perf_counter() - begin
        spans = line.seconds()
        rest = out.decode_seconds - spans["decode"] - spans["sample"] - numbers
        found.append(
            [
                1e6 * seconds / taken
                for seconds in (
                    parts.seconds["logits"],
                    numbers,
                    parts.seconds["draw"],
                    spans["sample"] - parts.seconds["draw"],
                    rest,
                )
            ]
        )
    speed = read_speed(np.random.default_rng(0).standard_normal((n, engine.model.n_vocab), np.float32))
    names = ("view of the logits", "uniform numbers", "draw", "bookkeeping", "between steps")
    # Bookkeeping reads a logit, a token and five numbers of eight bytes a row.
    sizes = (0, 8 * n, 4 * n * engine.model.n_vocab, 48 * n, 0)
    middle = np.median(found[1:], axis=0).tolist()
    return [
        [n, name, round(took, 2), size, round(1e6 * size / speed, 3)]
        for name, took, size in zip(names, middle, sizes, strict=True)
    ]


def cell(values: Sequence[float]) -> str:
    """A median, with quartiles if there are any."""
    if not values:
        return ""
    return f"{values[0]:.2f}" + (f" ({values[1]:.2f} to {values[2]:.2f})" if values[1:] else "")


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
    ways = [way for way in (ALONE, NUMPY, AT_ONCE, BY_ROW, IN_GRAPH) if way != AT_ONCE or can_sample_rows()]
    columns = ["rows", "law", *(f"{'+ ' if way != ALONE else ''}{way}, ms" for way in ways)]
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    rows = []
    for n in options.rows:
        for name, sampling in (("greedy", GREEDY), ("temperature 0.8, top-p 0.9", Sampling(0.8, top_p=0.9))):
            found = measure(model, n, sampling, ways, options)
            rows.append([n, name, *(cell(found.get(way, [])) for way in ways)])
            print("| " + " | ".join(map(str, rows[-1])) + " |", flush=True)
    where = f"{path.stem}, {model.n_vocab} tokens, {options.threads} threads"
    model.close()
    headings = ["rows", "part of a step", "us", "bytes", "us to read them once"]
    print("\n| " + " | ".join(headings) + " |\n|" + "---|" * len(headings))
    parts = []
    for n in options.rows:
        with LlamaEngine(path, threads=options.threads, n_gpu_layers=options.n_gpu_layers) as engine:
            for part in split(engine, n, options.steps, options.repeats):
                parts.append(part)
                print("| " + " | ".join(map(str, part)) + " |", flush=True)
    tables = [
        {"name": "samplers", "title": f"Choosing a token: {where}", "columns": columns, "rows": rows},
        {"name": "parts", "title": f"Temperature 0.8, top-p 0.9: {where}", "columns": headings, "rows": parts},
    ]
    print(json.dumps({"tables": tables}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
