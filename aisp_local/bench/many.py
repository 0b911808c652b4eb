"""Several prompts in one batch of rows against the same prompts one after another."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from aisp_local import shipped
from aisp_local.api import Aligner
from aisp_local.bench.tables import Table, paired, ratio, spread
from aisp_local.bench.workload import SIGMA
from aisp_local.engine import LlamaEngine
from aisp_local.engine.base import Feed
from aisp_local.rewards import load_reward
from aisp_local.timeline import OFF, Timeline
from aisp_local.types import Prompt, Result

_ANIMALS = ("fox", "bear", "owl", "mouse", "deer", "frog", "hare", "wolf")


class _Counting(LlamaEngine):
    """Counts how many rows there were in all steps."""

    row_steps = 0

    def run(self, feed: Feed, *, prompts: Any, n: int, max_tokens: int, at_once: int | None = None) -> None:
        rows, stop = min(n, self._parallel or n), feed.stop

        def counted() -> bool:  # asked before every step
            self.row_steps += rows
            return stop()

        feed.stop = counted  # type: ignore[method-assign]
        super().run(feed, prompts=prompts, n=n, max_tokens=max_tokens, at_once=at_once)


def many(path: Path, prompts: int, n: int, iterations: int, tokens: int, repeats: int) -> Table:
    """The same searches, with the same seeds, in one call and in a call each; and in rows of their own for all.

    "Fewer, larger iterations" spends the same samples one prompt after another in the rows that the shared batch has.
    "In turn" is the shared batch with half the rows, so that some searches decode while others are scored.
    """
    rows = prompts * n
    table = Table(
        "many",
        f"{prompts} prompts, aisp, {iterations} iterations of {n} rollouts each, at most {tokens} tokens, rewards "
        f"included: {path.stem}",
        ["what", "rows", "tokens/s", "over one after another (quartiles)", "rows that decoded", "decode", "scoring",
         "of it beside decoding"],
    )  # fmt: skip
    texts: list[Prompt] = [f"Once upon a time, there was a {_ANIMALS[i % 8]} who lived" for i in range(prompts)]
    options: dict[str, Any] = {"method": "aisp", "sigma": SIGMA, "max_tokens": tokens, "seed": 1}
    budget = n * iterations
    reward = load_reward(shipped.reward())
    whole, half = _Counting(path), _Counting(path, parallel=max(1, rows // 2))
    with whole, half:
        alone, halves = Aligner(whole, reward), Aligner(half, reward)

        def one_by_one(size: int) -> list[Any]:
            return [alone.generate(t, prompt_index=i, budget=budget, n=size, **options) for i, t in enumerate(texts)]

        sides: dict[str, tuple[_Counting, int, Callable[[], list[Any]]]] = {
            "one after another": (whole, n, lambda: one_by_one(n)),
            "one after another, fewer, larger iterations": (whole, min(rows, budget), lambda: one_by_one(rows)),
            "one batch": (whole, rows, lambda: alone.generate_many(texts, budget=budget, n=n, **options)),
            "one batch, in turn": (
                half,
                max(1, rows // 2),
                lambda: halves.generate_many(texts, budget=budget, n=n, **options),
            ),
        }

        def run(name: str) -> tuple[float, int]:
            begin = time.perf_counter()
            found: list[Result] = sides[name][2]()
            return time.perf_counter() - begin, sum(result.n_tokens for result in found)

        counted: dict[str, int] = {}

        def seconds_of(name: str) -> float:
            seconds, counted[name] = run(name)
            return seconds / counted[name]

        each = paired([lambda name=name: seconds_of(name) for name in sides], repeats)  # type: ignore[misc]
        for i, (name, (engine, size, _)) in enumerate(sides.items()):
            engine.timeline, engine.row_steps = Timeline(), 0
            wall, produced = run(name)
            timeline, engine.timeline = engine.timeline, OFF
            spent = timeline.seconds()
            score = spent.get("score", 0.0)
            table.rows.append(
                [
                    name,
                    size,
                    1 / float(np.median(each[:, i])),
                    spread(ratio(each[:, 0], each[:, i])),
                    _percent(produced / engine.row_steps),
                    _percent(spent["decode"] / wall),
                    _percent(score / wall),
                    _percent(timeline.overlap("score", "decode") / score if score else 0.0),
                ]
            )
    return table


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"
