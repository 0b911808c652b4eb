"""What a search saves that starts with the control of another: of a similar prompt, of its own, of the turn before.

    python benchmarks/steering.py [--pair dialogs] [--prompts 12] [--threads 1]

Of each shipped pair of model and reward three searches by `score` (256 rollouts each) on tuning prompts learn a control
each. Then, on evaluation prompts, with seeds of their own:

- cold: 256 rollouts from nothing;
- similar: 64 rollouts, from each of the three controls in turn (the mean of the three counts);
- same: 64 rollouts from what 64 others learnt on the same prompt;
- next turn: 64 rollouts that answer the next evaluation prompt in the same conversation, from what 64 learnt on the
  turn before, and the same from nothing.

Printed: the mean best reward after 32 and 64 rollouts, the paired difference to the same search from nothing with its
95% interval over prompts, and how many rollouts from nothing find as much as 32 that started with a control. Last line:
one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from aisp_local import Aligner, Result
from aisp_local.bench.contest import Pair, whole
from aisp_local.bench.contest_report import interval
from aisp_local.bench.contest_run import chosen_pairs
from aisp_local.bench.machine import describe
from aisp_local.bench.tables import Table
from aisp_local.steering import Steering
from aisp_local.types import Message

LEARN, COLD, SHORT = 256, 256, 64
AT = (32, 64)
CONTROLS = 3


def said(*turns: str) -> list[Message]:
    """A conversation of which the person has the first turn and the last."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


class Searches:
    """Searches of one pair; ``rewards``: in the order of the rollouts."""

    def __init__(self, aligner: Aligner, max_tokens: int) -> None:
        self.aligner, self._max_tokens = aligner, max_tokens

    def run(
        self, prompts: Sequence[list[Message]], budget: int, seed: int, steering: Steering | None = None
    ) -> list[Result]:
        results: list[Result] = []
        for i in range(0, len(prompts), 4):
            found = self.aligner.generate_many(
                prompts[i : i + 4], budget=budget, seed=seed + i, max_tokens=self._max_tokens, steering=steering
            )
            results += map(whole, found)
        return results

    def each(
        self, prompts: Sequence[list[Message]], budget: int, seed: int, steerings: Sequence[Steering]
    ) -> list[Result]:
        """With a control of its own for each prompt."""
        return [
            self.run([prompt], budget, seed + 100 * i, steering)[0]
            for i, (prompt, steering) in enumerate(zip(prompts, steerings, strict=True))
        ]


def rewards(results: Sequence[Result]) -> np.ndarray:
    """[prompts, rollouts] in the order in which they were drawn."""
    return np.array([[c.reward for c in sorted(r.candidates, key=lambda c: (c.iteration, c.row))] for r in results])


def best(found: np.ndarray, at: int) -> np.ndarray:
    return found[..., :at].max(axis=-1)


def measure(pair: Pair, threads: int | None) -> list[dict[str, Any]]:
    """One entry for each way to start."""
    with Aligner.load(pair.model, pair.reward, threads=threads) as aligner:
        searches = Searches(aligner, pair.max_tokens)
        learnt = searches.run([said(text) for text in pair.tuning[:CONTROLS]], LEARN, 1000)
        controls = [aligner.steering(result) for result in learnt]
        prompts = [said(text) for text in pair.evaluation]
        cold = rewards(searches.run(prompts, COLD, 0))
        similar = np.array([rewards(searches.run(prompts, SHORT, 2000, control)) for control in controls])
        before = searches.run(prompts, SHORT, 3000)
        kept = [aligner.steering(result) for result in before]
        same = rewards(searches.each(prompts, SHORT, 4000, kept))
        following = [*pair.evaluation[1:], pair.evaluation[0]]
        turns = [
            said(first, result.answer, second)
            for first, result, second in zip(pair.evaluation, before, following, strict=True)
        ]
        turn = rewards(searches.each(turns, SHORT, 5000, kept))
        turn_cold = rewards(searches.run(turns, COLD, 6000))
    ways = {"a similar prompt's": (similar, cold), "its own": (same, cold), "the turn before's": (turn, turn_cold)}
    rows = []
    for way, (warm, base) in ways.items():
        of_prompts = {at: best(warm, at).reshape(-1, len(prompts)).mean(axis=0) for at in AT}
        so_far = np.maximum.accumulate(base, axis=1).mean(axis=0)
        reached = np.flatnonzero(so_far >= of_prompts[AT[0]].mean())
        rows.append(
            {
                "pair": pair.name,
                "control": way,
                "prompts": len(prompts),
                "cold": {at: float(best(base, at).mean()) for at in AT},
                "warm": {at: float(of_prompts[at].mean()) for at in AT},
                "difference": {at: interval(of_prompts[at] - best(base, at)) for at in AT},
                "first_mean": (float(base[:, :32].mean()), float(warm[..., :32].mean())),
                "rollouts_from_nothing": -(-(int(reached[0]) + 1) // 32) * 32 if len(reached) else None,
            }
        )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    columns = ["pair", "control", *(f"from nothing, {at}" for at in AT), *(f"with it, {at}" for at in AT)]
    columns += [*(f"difference at {at} [95%]" for at in AT), "mean of the first 32: from nothing, with it"]
    columns.append("rollouts from nothing that are as good as 32 with it")  # an iteration has all of its 32 at once
    made = Table("steering", "Starting with a control that another search learnt", columns)
    for row in rows:
        worth = row["rollouts_from_nothing"]
        made.rows.append(
            [
                row["pair"],
                row["control"],
                *(f"{row['cold'][at]:.2f}" for at in AT),
                *(f"{row['warm'][at]:.2f}" for at in AT),
                *("{:+.2f} [{:+.2f}, {:+.2f}]".format(*row["difference"][at]) for at in AT),
                "{:.2f}, {:.2f}".format(*row["first_mean"]),
                f"more than {COLD}" if worth is None else f"{worth - 31} to {worth}",
            ]
        )
    return made.markdown()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", action="append", default=[], help="default: stories, stories-judge and dialogs")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--threads", type=int)
    asked = parser.parse_args(arguments)
    names = asked.pair or ["stories", "stories-judge", "dialogs"]
    rows = []
    for pair in chosen_pairs(None, None, None, None, names, asked.prompts, 96):
        rows += measure(pair, asked.threads)
        print(f"{pair.name} is done", file=sys.stderr)
    print(table(rows))
    print(json.dumps({"machine": describe(), "rows": rows}))


if __name__ == "__main__":
    main()
