"""Other wishes than a learnt reward: rules."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import resources

import numpy as np

from aisp_local.bench.contest_report import interval, shown
from aisp_local.bench.experiments.lab import SETTINGS, Experiment, Finding, Lab, mean, rewards, row
from aisp_local.bench.tables import Table
from aisp_local.rewards import Reward
from aisp_local.rewards.base import call
from aisp_local.rewards.composite import Composite
from aisp_local.rewards.recipe import load_recipe
from aisp_local.types import Result

_UNWANTED = re.compile(r"\b(sad|scared|afraid|angry|cry|cried|crying|mean|hurt|bad|mad|upset|lost)\b", re.I)


def _words(text: str) -> float:
    return float(len(text.split()))


def _unhappy(text: str) -> float:
    return float(len(_UNWANTED.findall(text)))


def _loud(text: str) -> float:
    return float(text.count("!") + text.count('"') / 2)


GOALS: tuple[tuple[str, str, str, Callable[[str], float]], ...] = (
    ("short", "length.toml", "words", _words),
    ("no unhappy words", "unhappy.toml", "unhappy words", _unhappy),
    ("calm", "calm.toml", "exclamation marks and quotations", _loud),
)


def _wish(name: str, learnt: Reward) -> Reward:
    """The rule of a file, beside a learnt reward in the place of the shipped one."""
    with resources.as_file(resources.files("aisp_local.bench.experiments").joinpath(name)) as path:
        read = load_recipe(path)
    first, *rules = read.parts
    return Composite([replace(first, reward=learnt, name=learnt.name), *rules], name=read.name)


def _scores(reward: Reward, lab: Lab, results: Sequence[Result]) -> list[float]:
    """Of each prompt's answer."""
    answers = zip(lab.prompts, results, strict=True)
    return [float(call(reward.name, reward.score, prompt, [result.answer])[0]) for prompt, result in answers]


def _objectives(lab: Lab) -> Finding:
    budget = lab.size(64, 16)
    learnt = lab.aligner.reward
    made = Table(
        "objectives",
        f"Answers of {budget} rollouts, means over {len(lab.prompts)} prompts; {row('best-of-n')}",
        [
            "wish",
            "what is counted",
            "base model",
            "best-of-n",
            "score",
            "reward: base",
            "best-of-n",
            "score",
            "score over best-of-n [95%]",
            f"{learnt.name} of score's answers over best-of-n's [95%]",
        ],
    )
    data = []
    for wish, file, counted, count in GOALS:
        reward = _wish(file, learnt)
        found: dict[str, tuple[float, float]] = {}
        got: dict[str, list[float]] = {}
        other: dict[str, list[float]] = {}
        for method, n in (("best-of-n", 16), ("score", None)):
            results = lab.search(method, budget, n, reward=reward, **SETTINGS.get(method, {}))
            if method == "best-of-n":
                drawn = [c for result in results for c in result.candidates]
                found["base"] = float(np.mean([count(c.text) for c in drawn])), float(mean(rewards(results)))
            got[method] = [result.reward for result in results]
            other[method] = _scores(learnt, lab, results)
            counts = [count(result.answer) for result in results]
            found[method] = float(np.mean(counts)), float(np.mean(got[method]))
        ways = ("base", "best-of-n", "score")
        over, of_other = (interval(np.subtract(each["score"], each["best-of-n"])) for each in (got, other))
        figures = [f"{found[way][i]:.2f}" for i in (0, 1) for way in ways]
        made.rows.append([wish, counted, *figures, shown(over, sign=True), shown(of_other, sign=True)])
        ahead = {"score over best-of-n": over, f"{learnt.name} over best-of-n": of_other}
        data.append({"wish": wish, **{way: found[way] for way in ways}, **ahead})
    return Finding([made], data=data)


OBJECTIVES = Experiment(
    "objectives",
    "Does the same search serve other wishes: shorter, happier, calmer answers?",
    "what is counted falls from the base's mean to the best-of-n answer's and further to score's, without any "
    "training; words that a rule can count are easily avoided, length least easily, since it cannot be told from a "
    "beginning. What is counted is what the rule itself forbids or limits: it shows that the search obeys, not that "
    "answers are better. What obeying costs is seen by the learnt reward alone, which is the other part of each wish.",
    _objectives,
)
