"""What a reward knows of beginnings, and what a search makes of one that errs."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from aisp_local.bench.experiments.lab import SETTINGS, Experiment, Finding, Lab, number, rewards
from aisp_local.bench.tables import Table
from aisp_local.rewards import Reward, load_reward
from aisp_local.rewards.base import call
from aisp_local.types import Prompt

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
            scores = call(reward.name, reward.score, prompt, [engine.text(tokens) for tokens in cut])
            if scores.std() > 0 and whole.std() > 0:
                into.append(float(np.corrcoef(scores, whole)[0, 1]))
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
)


class Noisy:
    """A reward plus noise that belongs to the text: asked twice it errs alike. ``share`` of the variance is noise."""

    def __init__(self, reward: Reward, share: float, spread: float, seed: int = 0) -> None:
        self._reward, self._share, self._spread, self._seed = reward, share, spread, seed
        self.name = f"{reward.name} with noise"

    def score(self, prompt: Prompt, responses: Sequence[str]) -> npt.NDArray[np.float32]:
        errors = self._spread * np.array([self._error(text) for text in responses])
        if self._share >= 1.0:
            return errors.astype(np.float32)
        true = call(self._reward.name, self._reward.score, prompt, responses)
        return (true + math.sqrt(self._share / (1 - self._share)) * errors).astype(np.float32)

    def _error(self, text: str) -> float:
        """Standard normal, by the text alone."""
        digest = hashlib.sha256(f"{self._seed} {text}".encode("utf-8", "replace")).digest()
        return float(np.random.default_rng(int.from_bytes(digest[:8], "little")).standard_normal())


def _noise(lab: Lab) -> Finding:
    words = load_reward(Path(str(resources.files("aisp_local.bench").joinpath("words.toml"))))
    found = [_noised(lab, lab.aligner.reward), _noised(lab, words)]
    return Finding([table for table, _ in found], data={table.title: data for table, data in found})


def _noised(lab: Lab, reward: Reward) -> tuple[Table, list[dict[str, Any]]]:
    budget = lab.size(128, 32)
    base = lab.search("best-of-n", lab.size(64, 16), 16, reward=reward, temperature=0.8, seed=9)
    spread = float(rewards(base).std(axis=1).mean()) or 1.0
    middle = float(rewards(base).mean())
    made = Table(
        f"noise-{reward.name}",
        f"{reward.name}: {budget} rollouts; in standard deviations of the base above its mean (base: {middle:.2f}, "
        f"sd {spread:.2f})",
        [
            "noise's share of the variance",
            "method",
            "what the search saw",
            "true reward of its answer",
            "searches with a warning",
        ],
    )
    data = []
    for share in lab.some((0.0, 0.2, 0.5, 0.8, 1.0)):
        noisy = Noisy(reward, share, spread)
        for method in ("score", "aisp", "best-of-n"):
            results = lab.search(method, budget, 16, reward=noisy, **SETTINGS.get(method, {}))
            true = [
                float(call(reward.name, reward.score, prompt, [result.answer])[0])
                for prompt, result in zip(lab.prompts, results, strict=True)
            ]
            zero = 0.0 if share >= 1.0 else middle
            seen = (float(np.mean([result.reward for result in results])) - zero) / spread
            got = (float(np.mean(true)) - middle) / spread
            warned = sum(any(stats.note for stats in result.iterations) for result in results)
            made.rows.append(
                [f"{100 * share:.0f}%", method, f"{seen:+.2f}", f"{got:+.2f}", f"{warned} of {len(results)}"]
            )
            data.append({"share": share, "method": method, "seen": seen, "true": got, "warned": warned})
    return made, data


NOISE = Experiment(
    "noise",
    "What is left of each method's gain as its reward, a learnt one and a rule of known optimum, becomes noise?",
    "what the search sees stays high, as it picks the luckiest errors, while the true reward falls towards the base's; "
    "with noise alone every method is random search: 0. Methods that learn must not fall below 0, and score's "
    "guard should say that rewards are noise, or that answers became worse or repetitive.",
    _noise,
)
