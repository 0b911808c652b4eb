"""``aisp-local bench speed``: the engine against what the machine, llama.cpp and its peers can do."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aisp_local import shipped
from aisp_local.api import Aligner
from aisp_local.bench import machine, synthetic
from aisp_local.bench.ceiling import reached
from aisp_local.bench.many import many
from aisp_local.bench.raw import RawLoop
from aisp_local.bench.sizes import QUICK, Sizes, growth, memory
from aisp_local.bench.tables import Table, paired, ratio, spread
from aisp_local.bench.workload import SIGMA, WARM, noise, prompt_of
from aisp_local.engine import LlamaEngine
from aisp_local.errors import InputError
from aisp_local.files import write_output
from aisp_local.rewards import load_reward
from aisp_local.seeds import RowSeeds
from aisp_local.timeline import OFF, Timeline
from aisp_local.types import GREEDY, Controls


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
            table.rows.append([n, name, *speed, spread(ratio(seconds[:, 0], seconds[:, 1]))])
    return table


def methods(path: Path, n: int, iterations: int, tokens: int, repeats: int, kl: bool = True) -> Iterator[Table]:
    """Item 2: searches against best-of-n, equal samples; and where their time goes. ``kl``: one with exact KL too."""
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
        "score": {"method": "score"},
        "score, nothing selected": {"method": "score", "selection": 0.0},
        "aisp-held": {"method": "aisp-held", "sigma": SIGMA},
        "aisp-held with KL": {"method": "aisp-held", "sigma": SIGMA, "kl": True},
    }
    if not kl:
        del variants["aisp-held with KL"]
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
                    spread(ratio(seconds[:, i], seconds[:, 0])),
                    counted[name],
                    spread(ratio(each, base)),
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
            row = [name, 1 / float(np.median(seconds[:, i])), spread(ratio(seconds[:, i], seconds[:, against]))]
            table.rows.append(row)
        high.close()
    return table


ITEMS = ("raw", "methods", "many", "peers", "growth", "memory")


def run(
    models: Sequence[Path], items: Sequence[str], repeats: int, quick: bool, say: Callable[[str], None]
) -> dict[str, Any]:
    """All tables of the given items on these models, said one by one; what a machine reads of them."""
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
        show(reached(path, counts, threads, 32, tokens, quick))
        if "raw" in items:
            show(against_raw(path, counts, tokens, 32, repeats))
        if "methods" in items:
            for table in methods(path, 8 if quick else 16, 2 if quick else 4, tokens, repeats):
                show(table)
        if "many" in items:
            show(many(path, *((2, 4, 2) if quick else (4, 8, 4)), tokens, repeats))
        if "peers" in items:
            show(peers(path, 4 if quick else 8, tokens, 32, repeats))
        if "memory" in items:
            show(memory(path, 4 * tokens, more=(40,) if quick else (24, 40, 72)))
    if "growth" in items:
        shape, sizes = (synthetic.Shape(1000, 128, 2, 2, 256), QUICK) if quick else (synthetic.Shape(), Sizes())
        for table in growth(shape, tokens, repeats, sizes):
            show(table)
    return {"machine": about, "tables": [{"name": t.name, "title": t.title, "rows": t.rows} for t in found]}


def _threads(path: Path) -> int:
    with LlamaEngine(path) as engine:
        return int(engine.settings["threads"])


BEGIN, END = "<!-- bench speed: begin -->", "<!-- bench speed: end -->"


def check_report(path: Path) -> None:
    """Raises InputError for a file of something else, which tables must not be added to."""
    if path.exists() and path.suffix.lower() != ".md" and BEGIN not in path.read_text("utf-8", "replace"):
        raise InputError(f"{path} is there and no Markdown file; give another to --report")


def write_report(path: Path, text: str) -> None:
    """Put ``text`` between the marks of a file, at its end if it has none."""
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    before, mark, rest = old.partition(BEGIN)
    after = rest.partition(END)[2] if mark else ""
    write_output(path, f"{before}{BEGIN}\n{text.strip()}\n{END}{after or chr(10)}")


def as_json(result: dict[str, Any]) -> str:
    return json.dumps(result, ensure_ascii=False)
