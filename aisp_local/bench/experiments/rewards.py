"""What a reward knows of beginnings, and what a search makes of one that errs."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from aisp_local.bench.contest_report import interval, number, shown
from aisp_local.bench.experiments.lab import (
    SETTINGS,
    WORDS,
    Array,
    Experiment,
    Finding,
    Lab,
    mean,
    rewards,
    row,
    spread_of,
)
from aisp_local.bench.tables import Table
from aisp_local.controllers.guard import MOSTLY_NOISE
from aisp_local.rewards import Reward, load_reward
from aisp_local.rewards.base import call, call_prefixes
from aisp_local.types import Prompt, Result

_SHARES = (1 / 8, 1 / 4, 1 / 2, 3 / 4)


def _beginnings(lab: Lab) -> Finding:
    """Correlations within a prompt, means over prompts: a beginning's score and that of the whole response."""
    reward, engine = lab.aligner.reward, lab.aligner.engine
    results = lab.search("best-of-n", lab.size(128, 16), 32, temperature=1.0, min_p=0.02)
    found: list[list[float]] = [[] for _ in _SHARES]
    for prompt, result in zip(lab.prompts, results, strict=True):
        whole = np.array([c.reward for c in result.candidates])
        for share, into in zip(_SHARES, found, strict=True):
            cut = [c.tokens[: max(1, round(share * len(c.tokens)))] for c in result.candidates if c.tokens is not None]
            scores = call_prefixes(reward, prompt, [engine.text(tokens) for tokens in cut])  # as searches do
            there = np.isfinite(scores) & np.isfinite(whole)
            if there.any() and scores[there].std() > 0 and whole[there].std() > 0:
                into.append(float(np.corrcoef(scores[there], whole[there])[0, 1]))
    means = [float(np.mean(one)) if one else float("nan") for one in found]
    made = Table(
        "beginnings",
        f"{reward.name}: correlation of a beginning's score with that of the whole, {len(lab.prompts)} prompts",
        ["tokens", *(f"{100 * share:g}%" for share in _SHARES)],
    )
    made.rows.append(["correlation", *map(number, means)])
    return Finding([made], data=dict(zip(map(str, _SHARES), means, strict=True)))


BEGINNINGS = Experiment(
    "beginnings",
    "How much of a response's reward is there to see in its beginning?",
    "the correlation rises with what there is of the response. Where it is near 0 until the end, selecting unfinished "
    "rollouts is drawing lots: `--option selection=0`.",
    _beginnings,
    prompts=8,
)


class Noisy:
    """A reward plus noise that belongs to the text: asked twice it errs alike. ``share`` of the variance is noise."""

    def __init__(self, reward: Reward, share: float, spread: float, seed: int = 0) -> None:
        self._reward, self._share, self._spread, self._seed = reward, share, spread, seed
        self.name = f"{reward.name} with noise"
        self.background = getattr(reward, "background", False)
        self.prefix, self.unfinished = getattr(reward, "prefix", False), getattr(reward, "unfinished", True)

    def score(self, prompt: Prompt, responses: Sequence[str]) -> npt.NDArray[np.float32]:
        return self._with_errors(lambda: call(self._reward.name, self._reward.score, prompt, responses), responses)

    def score_prefixes(self, prompt: Prompt, prefixes: Sequence[str]) -> npt.NDArray[np.float32]:
        return self._with_errors(lambda: call_prefixes(self._reward, prompt, prefixes), prefixes)

    def _with_errors(self, true: Callable[[], Array], texts: Sequence[str]) -> npt.NDArray[np.float32]:
        errors = self._spread * np.array([self._error(text) for text in texts])
        if self._share >= 1.0:
            return errors.astype(np.float32)
        return (true() + math.sqrt(self._share / (1 - self._share)) * errors).astype(np.float32)

    def _error(self, text: str) -> float:
        """Standard normal, by the text alone."""
        digest = hashlib.sha256(f"{self._seed} {text}".encode("utf-8", "replace")).digest()
        return float(np.random.default_rng(int.from_bytes(digest[:8], "little")).standard_normal())


def _noise(lab: Lab) -> Finding:
    found = [_noised(lab, lab.aligner.reward), _noised(lab, load_reward(WORDS))]
    return Finding([table for table, _ in found], data={table.title: data for table, data in found})


def _warned(results: Sequence[Result]) -> tuple[int, int]:
    """Searches whose guard said that the reward is noise, and those that it warned of anything else."""
    notes = [[stats.note.split("; ") for stats in result.iterations if stats.note] for result in results]
    said = [{note for one in each for note in one} for each in notes]
    return sum(MOSTLY_NOISE in each for each in said), sum(bool(each - {MOSTLY_NOISE}) for each in said)


def _true(reward: Reward, lab: Lab, texts: Sequence[Sequence[str]]) -> Array:
    """What the reward gives each prompt's texts without noise, in the mean."""
    pairs = zip(lab.prompts, texts, strict=True)
    return np.array([mean(call(reward.name, reward.score, prompt, each)) for prompt, each in pairs])


def _noised(lab: Lab, reward: Reward) -> tuple[Table, list[dict[str, Any]]]:
    budget = lab.size(128, 32)
    base = lab.search("best-of-n", lab.size(64, 16), 16, reward=reward, seed=9, **SETTINGS["best-of-n"])
    spread = float(mean(spread_of(rewards(base)))) or 1.0
    middles = mean(rewards(base), 1)  # of each prompt
    middle = float(mean(middles))
    made = Table(
        f"noise-{reward.name}",
        f"{reward.name}: {budget} rollouts; in standard deviations of the base above its mean (base: {middle:.2f}, "
        f"sd {spread:.2f})",
        [
            "noise's share of the variance",
            "method",
            "what the search saw",
            "true reward of its answer [95%]",
            "searches warned of noise",
            "warned of anything else",
        ],
    )
    data: list[dict[str, Any]] = []
    chance: Array | None = None

    def add(share: float, method: str, seen: float, true: Array, warned: tuple[int, int] | None) -> None:
        got = interval((true - middles) / spread)
        counts = ["-", "-"] if warned is None else [f"{count} of {len(true)}" for count in warned]
        made.rows.append([f"{100 * share:.0f}%", row(method), f"{seen:+.2f}", shown(got, sign=True), *counts])
        figures = {"share": share, "method": method, "seen": seen, "true": got[0], "interval": got}
        data.append({**figures, "noise": warned and warned[0], "other": warned and warned[1]})

    for share in lab.some((0.0, 0.2, 0.5, 0.8, 1.0)):
        noisy, zero = Noisy(reward, share, spread), 0.0 if share >= 1.0 else middle
        for method in ("score", "aisp", "best-of-n"):
            results = lab.search(method, budget, lab.size(32, 16), reward=noisy, **SETTINGS.get(method, {}))
            seen = (float(np.mean([result.reward for result in results])) - zero) / spread
            add(share, method, seen, _true(reward, lab, [[result.answer] for result in results]), _warned(results))
        # Those of best-of-n, the last; it draws the same ones whatever their rewards.
        chance = _true(reward, lab, [[c.text for c in r.candidates] for r in results]) if chance is None else chance
        add(share, "random choice", (float(mean(rewards(results))) - zero) / spread, chance, None)
    return made, data


NOISE = Experiment(
    "noise",
    "What is left of each method's gain as its reward, a learnt one and a rule of known optimum, becomes noise?",
    "what the search sees stays high, as it picks the luckiest errors, while the true reward falls towards the base's; "
    "with noise alone every method is like a random choice among best-of-n's rollouts. Methods that learn must not "
    "fall below it, and score's guard should say that rewards are noise, or that answers became worse or repetitive. "
    "aisp has no guard: its rollouts of an iteration come from one law, so that it has no siblings whose rewards could "
    "be more alike than others'; only score can tell noise.",
    _noise,
    prompts=8,
)
