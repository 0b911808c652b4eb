"""What each size costs: time by rollouts, lengths, vocabulary and width; memory."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from aisp_local.api import Aligner
from aisp_local.bench import machine, synthetic
from aisp_local.bench.tables import Table, paired, ratio, spread
from aisp_local.bench.workload import SIGMA, WARM, noise, prompt_of
from aisp_local.engine import LlamaEngine
from aisp_local.rewards.function import CallableReward
from aisp_local.seeds import RowSeeds
from aisp_local.types import Controls


@dataclass(frozen=True)
class _Point:
    """``n`` rollouts of ``new`` tokens after a prompt of ``prompt``, under trajectories of ``window`` steps."""

    label: int
    path: Path
    n: int
    prompt: int
    new: int
    window: int


@dataclass(frozen=True)
class Sizes:
    """The points of each table of ``growth``; ``widths`` are multiples of 64."""

    rollouts: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128)
    prompts: Sequence[int] = (16, 256, 1024)
    new_tokens: Sequence[int] = (16, 64, 256)
    vocabularies: Sequence[int] = (32_000, 128_000, 256_000)
    widths: Sequence[int] = (256, 512, 1024, 2048)
    iterations: Sequence[int] = (1, 2, 4, 8)


QUICK = Sizes((1, 4), (16, 64), (4, 16), (1000, 2000), (64, 128), (1, 2))


def growth(shape: synthetic.Shape, tokens: int, repeats: int = 5, sizes: Sizes | None = None) -> Iterator[Table]:
    """Item 5: what each size costs. The points of a table run in turn."""
    sizes = sizes or Sizes()
    path = synthetic.cached(shape)
    width, layers = min(shape.width, 512), min(shape.layers, 4)
    thin = replace(shape, width=width, heads=width // 64, layers=layers)

    def point(
        label: int, path: Path = path, n: int = 8, prompt: int = 32, new: int = tokens, window: int = 0
    ) -> _Point:
        return _Point(label, path, n, prompt, new, window or new)

    def wide(width: int) -> Path:
        hidden = 8 * width // 3 // 32 * 32
        return synthetic.cached(replace(shape, width=width, heads=width // 64, layers=layers, hidden=hidden))

    by = {
        "rollouts": [point(n, n=n) for n in sizes.rollouts],
        "prompt tokens (8 rollouts)": [point(p, prompt=p) for p in sizes.prompts],
        "new tokens (8 rollouts)": [point(t, new=t) for t in sizes.new_tokens],
        "control steps (8 rollouts)": [point(w, window=w) for w in (1, tokens // 4, tokens)],
        f"vocabulary (8 rollouts, {layers} layers)": [
            point(v, synthetic.cached(replace(thin, vocabulary=v))) for v in sizes.vocabularies
        ],
        f"width (8 rollouts, {layers} layers)": [point(w, wide(w)) for w in sizes.widths],
    }
    for what, points in by.items():
        yield _grown(what, points, repeats)
    yield growth_with_iterations(path, tokens, repeats, sizes.iterations)


def _grown(what: str, points: Sequence[_Point], repeats: int) -> Table:
    name = what.split(" (")[0]
    table = Table(
        "growth",
        f"Growth with {what}",
        [name, "tokens/s", "ms a step", f"time a token over that with {points[0].label} (quartiles)"],
    )
    with ExitStack() as stack:
        engines = {path: stack.enter_context(LlamaEngine(path)) for path in {point.path for point in points}}

        def a_token(point: _Point) -> float:
            engine = engines[point.path]
            controls = Controls(point.n, noise(engine, point.n, point.window), sampling=WARM)
            text = prompt_of(engine, point.prompt)
            done = engine.rollout(text, controls, max_tokens=point.new, seeds=RowSeeds(1))
            return done.decode_seconds / done.n_tokens

        each = paired([lambda point=point: a_token(point) for point in points], repeats)  # type: ignore[misc]
    for i, point in enumerate(points):
        middle = float(np.median(each[:, i]))
        over = spread(ratio(each[:, i], each[:, 0]))
        table.rows.append([point.label, 1 / middle, 1e3 * point.n * middle, over])
    return table


def growth_with_iterations(path: Path, tokens: int, repeats: int, counts: Sequence[int]) -> Table:
    """What one more iteration costs: the prompt is decoded once, and nothing is carried along."""
    table = Table(
        "growth",
        "Growth with iterations (aisp, 8 rollouts each)",
        ["iterations", "seconds", "s an iteration", "time an iteration over that of one (quartiles)"],
    )
    reward = CallableReward(lambda _, responses: [float(len(response)) for response in responses])
    with Aligner(LlamaEngine(path), reward) as aligner:
        text = prompt_of(aligner.engine, 32)  # type: ignore[arg-type]

        def search(iterations: int) -> float:
            aligner.engine.forget()  # type: ignore[attr-defined]
            start = time.perf_counter()
            aligner.generate(text, method="aisp", sigma=SIGMA, budget=8 * iterations, n=8, max_tokens=tokens)
            return time.perf_counter() - start

        seconds = paired([lambda count=count: search(count) for count in counts], repeats)  # type: ignore[misc]
    for i, count in enumerate(counts):
        middle = float(np.median(seconds[:, i]))
        over = spread(ratio(seconds[:, i] / count, seconds[:, 0]))
        table.rows.append([count, middle, middle / count, over])
    return table


def predicted_memory(engine: LlamaEngine, n: int, tokens: int, prompt: int = 1) -> int:
    """Bytes that n rollouts of ``tokens`` after a prompt take beside the model; the table of docs/engine.md.

    KV cache, control trajectories (the controller's and llama.cpp's), logits, and of a step's attention the mask, and
    without flash attention the scores.
    """
    model = engine.model
    seen = n * (prompt + n * tokens)  # of all cells by all rows
    cells = -(-(prompt - 1 + n * tokens) // 256) * 256
    attention = 4 * (model.n_head + 1) * seen if engine.settings["flash_attention"] is False else 6 * seen
    return cells * model.kv_bytes_per_token + 2 * 4 * n * tokens * model.d + 4 * n * model.n_vocab + attention


def memory(path: Path, tokens: int, few: int = 8, more: Sequence[int] = (24, 40, 72)) -> Table:
    """Item 5: resident memory of rollouts, predicted and measured in processes of their own."""
    table = Table(
        "memory",
        f"Memory of rollouts of {tokens} tokens beyond that of {few}: KV + 2 trajectories + logits + mask "
        f"(+ scores without flash attention): {path.stem}",
        ["rollouts", "MiB predicted", "of it KV", "MiB measured", "measured over predicted"],
    )
    code = "from aisp_local.bench.sizes import resident_after; import sys; resident_after(*sys.argv[1:])"

    def of(n: int) -> list[int]:
        command = [sys.executable, "-c", code, str(path), str(n), str(tokens)]
        found: list[int] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
        return found

    least = of(few)
    for n in more:
        measured, predicted, kv = (b - a for a, b in zip(least, of(n), strict=True))
        table.rows.append([n, predicted / 2**20, kv / 2**20, measured / 2**20, measured / predicted])
    return table


def resident_after(path: str, n: str, tokens: str) -> None:
    """Print the resident bytes of this process after rollouts, those predicted, and those of the KV cache."""
    rows, steps = int(n), int(tokens)
    text = "Once upon a time"
    with LlamaEngine(path) as engine:
        controls = Controls(rows, noise(engine, rows, steps))
        engine.rollout(text, controls, max_tokens=steps, seeds=RowSeeds(1))
        prompt = len(engine.tokens(text))
        kv = engine.model.kv_bytes_per_token * (prompt - 1 + rows * steps)
        print(json.dumps([machine.resident(), predicted_memory(engine, rows, steps, prompt), kv]))
