"""Other wishes than a learnt reward: rules."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import resources

import numpy as np

from aisp_local.bench.experiments.lab import SETTINGS, Experiment, Finding, Lab, rewards
from aisp_local.bench.tables import Table
from aisp_local.rewards import Reward, load_reward

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


def _reward(name: str) -> Reward:
    with resources.as_file(resources.files("aisp_local.bench.experiments").joinpath(name)) as path:
        return load_reward(path)


def _objectives(lab: Lab) -> Finding:
    budget = lab.size(64, 16)
    made = Table(
        "objectives",
        f"Answers of {budget} rollouts, means over {len(lab.prompts)} prompts",
        ["wish", "what is counted", "base model", "best-of-n", "score", "reward: base", "best-of-n", "score"],
    )
    data = []
    for wish, file, counted, count in GOALS:
        reward = _reward(file)
        found: dict[str, tuple[float, float]] = {}
        for method, n in (("best-of-n", 16), ("score", None)):
            results = lab.search(method, budget, n, reward=reward, **SETTINGS.get(method, {}))
            if method == "best-of-n":
                drawn = [c for result in results for c in result.candidates]
                found["base"] = float(np.mean([count(c.text) for c in drawn])), float(rewards(results).mean())
            answers = [count(result.answer) for result in results], [result.reward for result in results]
            found[method] = float(np.mean(answers[0])), float(np.mean(answers[1]))
        ways = ("base", "best-of-n", "score")
        made.rows.append(
            [wish, counted, *(f"{found[way][0]:.2f}" for way in ways), *(f"{found[way][1]:.2f}" for way in ways)]
        )
        data.append({"wish": wish, **{way: found[way] for way in ways}})
    return Finding([made], data=data)


OBJECTIVES = Experiment(
    "objectives",
    "Does the same search serve other wishes: shorter, happier, calmer answers?",
    "what is counted falls from the base's mean to the best-of-n answer's and further to score's, without any "
    "training; words that a rule can count are easily avoided, length least easily, since it cannot be told from a "
    "beginning.",
    _objectives,
)
