"""``aisp-local bench speed``: the engine against what the machine, llama.cpp and its peers can do."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from aisp_local import shipped
from aisp_local.api import Aligner
from aisp_local.bench import machine, synthetic
from aisp_local.bench.raw import RawLoop
from aisp_local.engine import LlamaEngine
from aisp_local.engine.head import has_tensor
from aisp_local.files import write_output
from aisp_local.rewards import load_reward
from aisp_local.rewards.function import CallableReward
from aisp_local.seeds import RowSeeds
from aisp_local.timeline import OFF, Timeline
from aisp_local.types import GREEDY, Controls, Sampling

WARM = Sampling(0.8, top_p=0.9)
SIGMA = 0.3
_TEXT = "Once upon a time, in a big forest, there lived a fox who wanted to see the sea. " * 20


@dataclass(frozen=True)
class Table:
    """Rows to print and to keep."""

    name: str
    title: str
    columns: Sequence[str]
    rows: list[list[Any]] = field(default_factory=list)

    def markdown(self) -> str:
        lines = [f"### {self.title}", "", "| " + " | ".join(self.columns) + " |", "|" + "---|" * len(self.columns)]
        lines += ["| " + " | ".join(map(_cell, row)) + " |" for row in self.rows]
        return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"
    return str(value)


def paired(runs: Sequence[Callable[[], float]], repeats: int) -> np.ndarray[Any, Any]:
    """Seconds [repeats, runs], in turn and in turned order, after one round that is not counted."""
    seconds = np.zeros((repeats + 1, len(runs)))
    for repeat in range(repeats + 1):
        order = range(len(runs)) if repeat % 2 else range(len(runs) - 1, -1, -1)
        for i in order:
            seconds[repeat, i] = runs[i]()
    return seconds[1:]


def ratio(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> list[float]:
    """Median and quartiles of the paired ratios a / b."""
    middle, low, high = np.quantile(a / b, [0.5, 0.25, 0.75])
    return [float(middle), float(low), float(high)]


def _spread(values: Sequence[float]) -> str:
    return f"{values[0]:.3f} ({values[1]:.3f} to {values[2]:.3f})"


def prompt_of(engine: LlamaEngine, tokens: int) -> str:
    """A prompt of about so many tokens."""
    text = _TEXT * (1 + tokens // 200)
    low, high = 1, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(engine.tokens(text[:middle])) <= tokens else (low, middle - 1)
    return text[:low].rstrip()


def noise(engine: LlamaEngine, n: int, steps: int, held: bool = False) -> np.ndarray[Any, Any]:
    shape = (n, 1 if held else steps, engine.d)
    return np.float32(SIGMA) * np.random.default_rng(0).standard_normal(shape, np.float32)


def ceiling(path: Path, rows: Sequence[int], threads: int, prompt: int, tokens: int) -> Table:
    """The fastest that a step could be, were it nothing but reading weights and cache, or multiplying.

    What the processor multiplies at best is what this build does with 512 rows at a time.
    """
    bandwidth, batch = machine.memory_bandwidth(threads), 512
    with LlamaEngine(path) as engine:
        model, weights = engine.model, path.stat().st_size
        each = model.kv_bytes_per_token
        embedding = model.n_vocab * engine.d
        tied = not has_tensor(path, "output.weight")
        body = model.n_parameters - (1 if tied else 2) * embedding
        raw = RawLoop(model, rows=1, n_ctx=batch, threads=threads, flash_attention=None)
        seconds = min(raw.prefill(np.arange(batch, dtype=np.int32) % 200) for _ in range(4))
        raw.close()
    peak = batch * (body + each // 2 * batch // 2) / seconds
    table = Table(
        "ceiling",
        f"Ceiling: {path.stem}, {bandwidth / 2**30:.1f} GiB/s read with {threads} threads, "
        f"{peak / 1e9:.0f} billion multiply-adds/s with {batch} rows",
        ["rollouts", "MiB read a step", "million multiply-adds", "tokens/s by memory", "tokens/s by arithmetic"],
    )
    size = body + embedding  # the embedding of a token is one row, not a product; the output matrix is one
    for n in rows:
        cells = prompt + n * tokens // 2
        read = weights * (size / model.n_parameters) + each * cells
        products = n * (size + each // 2 * (prompt + tokens // 2))
        table.rows.append([n, read / 2**20, products / 1e6, n * bandwidth / read, n * peak / products])
    return table


def against_raw(path: Path, rows: Sequence[int], tokens: int, prompt: int, repeats: int) -> Table:
    """Item 1: our engine against a loop that decodes the same tokens and does nothing else."""
    table = Table(
        "raw",
        f"Engine against a raw llama_decode loop, same tokens: {path.stem}, prompt {prompt}, {tokens} new tokens",
        ["rollouts", "decoding", "tokens/s raw", "tokens/s engine", "engine over raw (quartiles)"],
    )
    for n in rows:
        for name, sampling in (("greedy", GREEDY), ("temperature 0.8, top-p 0.9", WARM)):
            with LlamaEngine(path) as engine:
                text = prompt_of(engine, prompt)
                controls = Controls(n, noise(engine, n, tokens), sampling=sampling)

                def roll() -> Any:
                    return engine.rollout(text, controls, max_tokens=tokens, seeds=RowSeeds(1))  # noqa: B023

                done = roll()
                raw = RawLoop(engine.model, rows=n, **engine.settings)
                ids = engine.tokens(text)
                runs = [lambda: raw.replay(ids, done.tokens), lambda: roll().decode_seconds]  # noqa: B023
                seconds = paired(runs, repeats)
                raw.close()
            middle = np.median(seconds, axis=0)
            speed = [done.n_tokens / s for s in middle]
            table.rows.append([n, name, *speed, _spread(ratio(seconds[:, 0], seconds[:, 1]))])
    return table


def methods(path: Path, n: int, iterations: int, tokens: int, repeats: int) -> Iterator[Table]:
    """Item 2: searches against best-of-n, equal samples; and where their time goes."""
    table = Table(
        "methods",
        f"Methods, rewards and updates included: {path.stem}, {iterations} iterations of {n} rollouts, "
        f"at most {tokens} tokens",
        ["method", "seconds", "over best-of-n (quartiles)", "tokens", "time a token over best-of-n"],
    )
    shares = Table(
        "timeline",
        f"Where the time goes: {path.stem}, share of the wall-clock (work in another thread overlaps)",
        ["method", "decode", "sample", "prefill", "ask", "update", "score (beside)"],
    )
    options: Any = {"budget": n * iterations, "n": n, "max_tokens": tokens}
    variants: dict[str, dict[str, Any]] = {
        "best-of-n": {"method": "best-of-n", "temperature": 0.8},
        "aisp": {"method": "aisp", "sigma": SIGMA},
        "aisp-held": {"method": "aisp-held", "sigma": SIGMA},
        "aisp-held with KL": {"method": "aisp-held", "sigma": SIGMA, "kl": True},
    }
    with Aligner(LlamaEngine(path), load_reward(shipped.reward())) as aligner:
        counted: dict[str, int] = {}
        text = prompt_of(aligner.engine, 24)  # type: ignore[arg-type]

        def run(name: str) -> float:
            start = time.perf_counter()
            counted[name] = aligner.generate(text, seed=1, **options, **variants[name]).n_tokens
            return time.perf_counter() - start

        seconds = paired([lambda name=name: run(name) for name in variants], repeats)  # type: ignore[misc]
        for i, name in enumerate(variants):
            each = seconds[:, i] / counted[name]
            base = seconds[:, 0] / counted["best-of-n"]
            table.rows.append(
                [
                    name,
                    float(np.median(seconds[:, i])),
                    _spread(ratio(seconds[:, i], seconds[:, 0])),
                    counted[name],
                    _spread(ratio(each, base)),
                ]
            )
            engine: Any = aligner.engine
            engine.timeline = Timeline()
            wall = run(name)
            spent = engine.timeline.seconds()
            engine.timeline = OFF
            parts = ("decode", "sample", "prefill", "ask", "update", "score")
            shares.rows.append([name, *(f"{100 * spent.get(part, 0.0) / wall:.1f}%" for part in parts)])
    yield table
    yield shares


def peers(path: Path, n: int, tokens: int, prompt: int, repeats: int) -> Table:
    """Item 4: n responses from llama-cpp-python's own interface, one after the other, and from the callback."""
    import llama_cpp

    table = Table(
        "peers",
        f"{n} responses of {tokens} tokens, temperature 0.8, top-p 0.9: {path.stem}, prompt {prompt}",
        ["what", "tokens/s", "engine over it (quartiles)"],
    )
    with LlamaEngine(path) as engine, LlamaEngine(path, control="callback") as callback:
        text = prompt_of(engine, prompt)
        high = llama_cpp.Llama(
            str(path), n_ctx=prompt + tokens + 64, n_threads=engine.settings["threads"], verbose=False
        )
        produced = {"high": 0, "engine": 0}

        def one_by_one() -> float:
            start, produced["high"] = time.perf_counter(), 0
            for i in range(n):
                out: Any = high.create_completion(text, max_tokens=tokens, temperature=0.8, top_p=0.9, seed=i)
                produced["high"] += out["usage"]["completion_tokens"]
            return (time.perf_counter() - start) / produced["high"]

        def roll(which: LlamaEngine, controls: Controls) -> float:
            start = time.perf_counter()
            done = which.rollout(text, controls, max_tokens=tokens, seeds=RowSeeds(1))
            return (time.perf_counter() - start) / done.n_tokens

        plain = Controls(n, sampling=WARM)
        moved = Controls(n, noise(engine, n, tokens), sampling=WARM)
        runs = [
            lambda: roll(engine, plain),
            one_by_one,
            lambda: roll(engine, moved),
            lambda: roll(callback, moved),
        ]
        seconds = paired(runs, repeats)
        names = ["engine", "llama-cpp-python's create_completion", "engine, controlled", "callback, controlled"]
        for i, name in enumerate(names):
            against = 0 if i < 2 else 2
            row = [name, 1 / float(np.median(seconds[:, i])), _spread(ratio(seconds[:, i], seconds[:, against]))]
            table.rows.append(row)
        high.close()
    return table


def growth(shape: synthetic.Shape, tokens: int) -> Iterator[Table]:
    """Item 5: what each size costs."""

    def measure(path: Path, n: int, prompt: int, new: int, window: int | None = None) -> float:
        with LlamaEngine(path) as engine:
            text = prompt_of(engine, prompt)
            controls = Controls(n, noise(engine, n, window or new), sampling=WARM)
            return min(
                (done := engine.rollout(text, controls, max_tokens=new, seeds=RowSeeds(1))).decode_seconds
                / done.n_tokens
                for _ in range(2)
            )

    path = synthetic.cached(shape)
    by: dict[str, list[tuple[Any, ...]]] = {
        "rollouts": [(str(n), path, n, 32, tokens) for n in (1, 2, 4, 8, 16, 32, 64, 128)],
        "prompt tokens (8 rollouts)": [(str(p), path, 8, p, tokens) for p in (16, 256, 1024)],
        "new tokens (8 rollouts)": [(str(t), path, 8, 32, t) for t in (16, 64, 256)],
        "control steps (8 rollouts)": [(str(w), path, 8, 32, tokens, w) for w in (1, tokens // 4, tokens)],
        "vocabulary (8 rollouts, 4 layers)": [
            (str(v), synthetic.cached(replace(shape, vocabulary=v, width=512, heads=8, layers=4)), 8, 32, tokens)
            for v in (32_000, 128_000, 256_000)
        ],
        "width (8 rollouts, 4 layers)": [
            (str(w), synthetic.cached(replace(shape, width=w, heads=w // 64, layers=4, hidden=8 * w // 3 // 32 * 32)),
             8, 32, tokens)
            for w in (256, 512, 1024, 2048)
        ],
    }  # fmt: skip
    for what, points in by.items():
        table = Table("growth", f"Growth with {what}", [what.split(" (")[0], "tokens/s", "ms a step"])
        for label, *point in points:
            each = measure(*point)
            table.rows.append([label, 1 / each, 1e3 * point[1] * each])
        yield table
    yield growth_with_iterations(path, tokens)


def growth_with_iterations(path: Path, tokens: int) -> Table:
    """What one more iteration costs: the prompt is decoded once, and nothing is carried along."""
    table = Table(
        "growth", "Growth with iterations (aisp, 8 rollouts each)", ["iterations", "seconds", "s an iteration"]
    )
    with Aligner(LlamaEngine(path), CallableReward(lambda _, responses: [float(len(r)) for r in responses])) as aligner:
        text = prompt_of(aligner.engine, 32)  # type: ignore[arg-type]
        for iterations in (1, 2, 4, 8):
            seconds = []
            for _ in range(2):
                aligner.engine.forget()  # type: ignore[attr-defined]
                start = time.perf_counter()
                aligner.generate(text, method="aisp", budget=8 * iterations, n=8, max_tokens=tokens)
                seconds.append(time.perf_counter() - start)
            table.rows.append([iterations, min(seconds), min(seconds) / iterations])
    return table


def predicted_memory(engine: LlamaEngine, n: int, tokens: int) -> int:
    """Bytes that n rollouts of a short prompt take beside the model.

    KV cache, control trajectories (the controller's and llama.cpp's), logits and, without flash attention, the
    attention scores of a step and their mask.
    """
    model = engine.model
    cells = n * tokens
    scores = n * cells * (model.n_head + 1) * 4 if engine.settings["flash_attention"] is False else n * cells * 2
    return cells * model.kv_bytes_per_token + 2 * n * tokens * model.d * 4 + n * model.n_vocab * 4 + scores


def memory(path: Path, tokens: int, rows: Sequence[int] = (8, 40)) -> Table:
    """Item 5: resident memory of rollouts, predicted and measured in processes of their own."""
    few, many = rows
    table = Table(
        "memory",
        f"Memory of {many} rollouts of {tokens} tokens beyond that of {few}: KV + 2 trajectories + logits + "
        f"attention scores: {path.stem}",
        ["MiB predicted", "of it KV", "MiB measured", "measured over predicted"],
    )
    code = "from aisp_local.bench.speed import resident_after; import sys; resident_after(*sys.argv[1:])"
    out = [
        json.loads(
            subprocess.run(
                [sys.executable, "-c", code, path, str(n), str(tokens)], stdout=subprocess.PIPE, check=True
            ).stdout
        )
        for n in rows
    ]
    measured, predicted, kv = (b - a for a, b in zip(*out, strict=True))
    table.rows.append([predicted / 2**20, kv / 2**20, measured / 2**20, measured / predicted])
    return table


def resident_after(path: str, n: str, tokens: str) -> None:
    """Print the resident bytes of this process after rollouts, those predicted, and those of the KV cache."""
    rows, steps = int(n), int(tokens)
    with LlamaEngine(path) as engine:
        controls = Controls(rows, noise(engine, rows, steps))
        engine.rollout("Once upon a time", controls, max_tokens=steps, seeds=RowSeeds(1))
        kv = engine.model.kv_bytes_per_token * rows * steps
        print(json.dumps([machine.resident(), predicted_memory(engine, rows, steps), kv]))


ITEMS = ("raw", "methods", "peers", "growth", "memory")


def run(
    models: Sequence[Path], items: Sequence[str], repeats: int, quick: bool, say: Callable[[str], None]
) -> dict[str, Any]:
    """All tables of the given items on these models, said one by one; what a machine reads of them."""
    large = synthetic.Shape()
    threads = _threads(models[0])
    tokens, counts = (16, (1, 8)) if quick else (64, (1, 8, 16, 32))
    about = machine.describe() | {"threads": str(threads)}
    about |= {f"sha256 of {path.name}": machine.sha256(path) for path in models}
    say(", ".join(f"{key} {value}" for key, value in about.items()) + "\n")
    found: list[Table] = []

    def show(table: Table) -> None:
        found.append(table)
        say(table.markdown())

    for path in models:
        show(ceiling(path, counts, threads, 32, tokens))
        if "raw" in items:
            show(against_raw(path, counts, tokens, 32, repeats))
        if "methods" in items:
            for table in methods(path, 8 if quick else 16, 2 if quick else 4, tokens, repeats):
                show(table)
        if "peers" in items:
            show(peers(path, 4 if quick else 8, tokens, 32, repeats))
        if "memory" in items:
            show(memory(path, 4 * tokens))
    if "growth" in items:
        for table in growth(synthetic.Shape(2000, 256, 2, 4, 512) if quick else large, tokens):
            show(table)
    return {"machine": about, "tables": [{"name": t.name, "title": t.title, "rows": t.rows} for t in found]}


def _threads(path: Path) -> int:
    with LlamaEngine(path) as engine:
        return int(engine.settings["threads"])


BEGIN, END = "<!-- bench speed: begin -->", "<!-- bench speed: end -->"


def write_report(path: Path, text: str) -> None:
    """Put ``text`` between the marks of a file, at its end if it has none."""
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    before, mark, rest = old.partition(BEGIN)
    after = rest.partition(END)[2] if mark else ""
    write_output(path, f"{before}{BEGIN}\n{text.strip()}\n{END}{after or chr(10)}")


def as_json(result: dict[str, Any]) -> str:
    return json.dumps(result, ensure_ascii=False)
