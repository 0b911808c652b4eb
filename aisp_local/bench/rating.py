"""A person's judgement of stored answers: two to one prompt, in an order that does not tell whose they are."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from aisp_local.bench.contest import Run, Store
from aisp_local.bench.contest_report import interval
from aisp_local.bench.tables import Table
from aisp_local.errors import InputError

CHOICES = {"1": 1.0, "2": 0.0, "=": 0.5}
"""What a person may say, and what the answer shown first has of it."""


@dataclass(frozen=True)
class Question:
    """Two answers to a prompt; ``first`` is shown first."""

    pair: str
    prompt: str
    first: str  # labels
    second: str
    texts: tuple[str, str]

    @property
    def key(self) -> str:
        return json.dumps([self.pair, self.prompt, *sorted((self.first, self.second))])


@dataclass(frozen=True)
class Rating:
    """What was said: ``score`` is 1 if the first was better, 0 if the second was, 0.5 if neither."""

    pair: str
    prompt: str
    first: str
    second: str
    score: float


def questions(store: Store, labels: Sequence[str], seed: int) -> list[Question]:
    """Of all runs with the largest budget of their pair, every two methods on every prompt, in a drawn order.

    Raises InputError where there are no two answers to compare.
    """
    runs = store.runs()
    unknown = sorted(set(labels) - {run.label for run in runs})
    if unknown:
        raise InputError(f"there are no runs of {unknown[0]!r}; there are {', '.join(sorted({r.label for r in runs}))}")
    most: dict[tuple[str, str], int] = {}
    for run in runs:
        most[run.pair, run.label] = max(run.budget, most.get((run.pair, run.label), 0))
    answers: dict[tuple[str, str], dict[str, Run]] = {}
    for run in runs:
        if (not labels or run.label in labels) and run.budget == most[run.pair, run.label]:
            answers.setdefault((run.pair, run.prompt), {})[run.label] = run
    rng = random.Random(seed)
    found = []
    for (pair, prompt), by_label in answers.items():
        for both in itertools.combinations(sorted(by_label), 2):
            first, second = rng.sample(both, 2)
            texts = by_label[first].answer, by_label[second].answer
            if texts[0] != texts[1]:
                found.append(Question(pair, prompt, first, second, texts))
    if not found:
        raise InputError("there are no two different answers to one prompt; run bench quality with two methods first")
    rng.shuffle(found)
    return found


class Ratings:
    """Ratings in a file of JSON lines; what was rated is not asked again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.all: list[Rating] = []
        if path.exists():
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                try:
                    self.all.append(Rating(**json.loads(line)))
                except (ValueError, TypeError) as error:
                    raise InputError(f"{path}, line {number} is no rating; give another folder") from error

    def left(self, asked: Sequence[Question]) -> Iterator[Question]:
        done = {json.dumps([r.pair, r.prompt, *sorted((r.first, r.second))]) for r in self.all}
        return (question for question in asked if question.key not in done)

    def add(self, question: Question, score: float) -> None:
        rating = Rating(question.pair, question.prompt, question.first, question.second, score)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(rating)) + "\n")
        self.all.append(rating)


def rate(
    asked: Iterator[Question], ratings: Ratings, total: int, ask: Callable[[str], str], show: Callable[[str], None]
) -> None:
    """Ask until there is no more, or until somebody has enough (an empty answer, q, or the end of the input)."""
    for question in asked:
        show(f"\n--- {len(ratings.all) + 1} of {total} ---\n{question.prompt}")
        for number, text in enumerate(question.texts, 1):
            show(f"\n[{number}] {text}")
        while True:
            try:
                said = ask("Better: 1, 2, = (alike), q (enough)").strip().lower()
            except EOFError:
                return
            if said in ("", "q"):
                return
            if said in CHOICES:
                ratings.add(question, CHOICES[said])
                break
            show("please say 1, 2, = or q")


def table(ratings: Sequence[Rating], rewards: Mapping[tuple[str, str, str], float]) -> Table:
    """For every two methods: how often a person, and the reward, preferred the first, with 95% intervals.

    ``rewards``: of the answers, by pair, prompt and label.
    """
    made = Table(
        "ratings",
        f"{len(ratings)} ratings",
        ["pair", "method", "against", "ratings", "preferred by the person [95%]", "by the reward", "both agree"],
    )
    groups: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for r in ratings:
        a, b = sorted((r.first, r.second))
        score = r.score if r.first == a else 1.0 - r.score
        values = rewards.get((r.pair, r.prompt, a)), rewards.get((r.pair, r.prompt, b))
        by_reward = float("nan") if None in values else float(np.sign(values[0] - values[1])) / 2 + 0.5  # type: ignore[operator]
        groups.setdefault((r.pair, a, b), []).append((score, by_reward))
    for (pair, a, b), scores in sorted(groups.items()):
        person, reward = np.array(scores).T
        mean, low, high = interval(person)
        told = (person != 0.5) & np.isfinite(reward) & (reward != 0.5)
        agree = f"{100 * float((person[told] == reward[told]).mean()):.0f}%" if told.any() else "-"
        seen = reward[np.isfinite(reward)]
        by_reward_shown = f"{100 * float(seen.mean()):.0f}%" if len(seen) else "-"
        shown = f"{100 * mean:.0f}% [{100 * low:.0f}, {100 * high:.0f}]"
        made.rows.append([pair, a, b, len(scores), shown, by_reward_shown, agree])
    return made
