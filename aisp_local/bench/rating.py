"""A person's judgement of stored answers: two to one prompt, in an order that does not tell whose they are."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aisp_local.bench.tables import Table
from aisp_local.errors import InputError
from aisp_local.files import read_bytes
from aisp_local.jsonl import append, whole_lines
from aisp_local.reward_kit.statistics import wilson

CHOICES = {"1": 1.0, "2": 0.0, "=": 0.5}
"""What a person may say, and what the answer shown first has of it."""

_BEGIN, _NONE = b'{"pair": ', "is no rating; give another folder"  # of every line of ratings; of another


@dataclass(frozen=True)
class Answer:
    """What the method ``label`` answered; ``reward`` is None where it has no number."""

    pair: str
    prompt: str
    label: str
    text: str
    reward: float | None


@dataclass(frozen=True)
class Question:
    """Two answers to a prompt; ``first`` is shown first."""

    pair: str
    prompt: str
    first: str  # labels
    second: str
    texts: tuple[str, str]

    @property
    def answers(self) -> str:
        """A hash of both texts: a method whose answers have changed is asked about again."""
        by_label = sorted(zip((self.first, self.second), self.texts, strict=True))
        return hashlib.sha256(json.dumps([text for _, text in by_label]).encode()).hexdigest()[:16]

    @property
    def key(self) -> str:
        return _key(self)


@dataclass(frozen=True)
class Rating:
    """What was said: ``score`` is 1 if the first was better, 0 if the second was, 0.5 if neither.

    ``answers``: the question's.
    """

    pair: str
    prompt: str
    first: str
    second: str
    score: float
    answers: str = ""


def _key(of: Question | Rating) -> str:
    return json.dumps([of.pair, of.prompt, *sorted((of.first, of.second)), of.answers])


def read_answers(folder: Path) -> list[Answer]:
    """The answers that a report of ``bench quality`` counts, from its quality.json.

    Raises InputError where there is none, or none with answers.
    """
    path = folder / "quality.json"
    if not path.is_file():
        raise InputError(f"{folder} holds no quality.json; run bench quality with this folder first")
    data = read_bytes(path)
    try:
        pairs = json.loads(data.decode("utf-8"))["pairs"]
        answers = [_answer(pair["name"], entry) for pair in pairs for entry in pair["answers"]]
        if not answers:
            raise ValueError("it has none")
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise InputError(
            f"{path} holds no answers as bench quality writes them; run bench quality with this folder again"
        ) from error
    return answers


def _answer(pair: Any, entry: Any) -> Answer:
    """Raises TypeError for what is none."""
    reward = entry["reward"]
    if type(reward) not in (int, float, type(None)):
        raise TypeError("the reward is no number")
    texts = pair, entry["prompt"], entry["method"], entry["answer"]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("something that is not a text")
    return Answer(*texts, None if reward is None else float(reward))


def questions(answers: Sequence[Answer], labels: Sequence[str], seed: int) -> list[Question]:
    """Every two methods on every prompt where they answer differently, in a drawn order; of ``labels``, if any.

    Raises InputError for a label without answers, and where there are no two to compare.
    """
    known = sorted({answer.label for answer in answers})
    unknown = sorted(set(labels) - set(known))
    if unknown:
        raise InputError(f"there are no answers of {unknown[0]!r}; there are {', '.join(known)}")
    texts: dict[tuple[str, str], dict[str, str]] = {}
    for answer in answers:
        if not labels or answer.label in labels:
            texts.setdefault((answer.pair, answer.prompt), {})[answer.label] = answer.text
    rng = random.Random(seed)
    found = []
    for (pair, prompt), by_label in texts.items():
        for both in itertools.combinations(sorted(by_label), 2):
            first, second = rng.sample(both, 2)
            if by_label[first] != by_label[second]:
                found.append(Question(pair, prompt, first, second, (by_label[first], by_label[second])))
    if not found:
        raise InputError("there are no two different answers to one prompt; run bench quality with two methods first")
    rng.shuffle(found)
    return found


class Ratings:
    """Ratings in a file of JSON lines, each line whole; what was rated is not asked again.

    Raises InputError for a file of something else, and where a rating cannot be kept.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.all: list[Rating] = []
        for number, line in enumerate(whole_lines(path, _BEGIN, _NONE), 1):
            try:
                self.all.append(_rating(line))
            except (ValueError, TypeError, RecursionError) as error:
                raise InputError(f"{path}, line {number} {_NONE}") from error

    def left(self, asked: Sequence[Question]) -> Iterator[Question]:
        done = {_key(rating) for rating in self.all}
        return (question for question in asked if question.key not in done)

    def about(self, asked: Sequence[Question]) -> list[Rating]:
        """Those of answers that are still there."""
        there = {question.key for question in asked}
        return [rating for rating in self.all if _key(rating) in there]

    def add(self, question: Question, score: float) -> None:
        rating = Rating(question.pair, question.prompt, question.first, question.second, score, question.answers)
        append(self._path, json.dumps(asdict(rating)).encode() + b"\n")
        self.all.append(rating)


def _rating(line: bytes) -> Rating:
    """Raises ValueError or TypeError for what is none."""
    rating = Rating(**json.loads(line.decode("utf-8")))
    texts = rating.pair, rating.prompt, rating.first, rating.second, rating.answers
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("something that is not a text")
    if type(rating.score) not in (int, float) or rating.score not in CHOICES.values():
        raise ValueError("the score is none of 0, 0.5 and 1")
    return rating


def rate(asked: Sequence[Question], ratings: Ratings, ask: Callable[[str], str], show: Callable[[str], None]) -> None:
    """Ask what was not rated before, until somebody has enough (an empty answer, q, or the end of the input)."""
    done = len(ratings.about(asked))
    for number, question in enumerate(ratings.left(asked), done + 1):
        show(f"\n--- {number} of {len(asked)} ---\n{question.prompt}")
        for i, text in enumerate(question.texts, 1):
            show(f"\n[{i}] {text}")
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


def table(ratings: Sequence[Rating], answers: Sequence[Answer]) -> Table:
    """For every two methods: how often a person, and the reward that ``answers`` have, preferred the first.

    "Alike" is half a win. The 95% interval of the person's share is Wilson's score interval (E. B. Wilson, Journal of
    the American Statistical Association 22, 1927, pages 209 to 212), which holds for few and for unanimous ratings;
    with halves among them it is wider than it need be.
    """
    made = Table(
        "ratings",
        f"{len(ratings)} ratings",
        ["pair", "method", "against", "ratings", "preferred by the person [95%]", "by the reward", "both agree"],
    )
    rewards = {(answer.pair, answer.prompt, answer.label): answer.reward for answer in answers}
    groups: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for r in ratings:
        a, b = sorted((r.first, r.second))
        score = r.score if r.first == a else 1.0 - r.score
        values = rewards.get((r.pair, r.prompt, a)), rewards.get((r.pair, r.prompt, b))
        by_reward = float("nan") if None in values else float(np.sign(values[0] - values[1])) / 2 + 0.5  # type: ignore[operator]
        groups.setdefault((r.pair, a, b), []).append((score, by_reward))
    for (pair, a, b), scores in sorted(groups.items()):
        person, reward = np.array(scores).T
        low, high = wilson(float(person.sum()), len(person))
        told = (person != 0.5) & np.isfinite(reward) & (reward != 0.5)
        agree = f"{100 * float((person[told] == reward[told]).mean()):.0f}%" if told.any() else "-"
        seen = reward[np.isfinite(reward)]
        by_reward_shown = f"{100 * float(seen.mean()):.0f}%" if len(seen) else "-"
        shown = f"{100 * person.mean():.0f}% [{100 * max(0.0, low):.0f}, {100 * high:.0f}]"  # no -0
        made.rows.append([pair, a, b, len(scores), shown, by_reward_shown, agree])
    return made
