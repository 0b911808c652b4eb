"""A guard against too much steering: it looks at what rollouts became, whatever their nats are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_STRIKES = 2  # iterations in a row that are worse than the first
_WORSE = 2.0  # by so many of its standard deviations
_ENOUGH = 16  # rollouts: fewer are soon all of one parent, whose spread is none to measure others by
_VARIETY = 0.8  # of the first iteration's: below it, answers repeat themselves
_LOOPING = 0.5  # of all trigrams: below it they do, whatever came before; code and lists have more
_TELLING = 24  # tokens: of shorter answers variety says little
_FAMILIES = 16  # less one for each pause: of fewer, likeness says little
_CHANCE = 2.5  # standard errors of an F of 1


@dataclass(frozen=True)
class Verdict:
    """What to do: multiply the control with ``factor``."""

    factor: float
    note: str


MOSTLY_NOISE = (
    "rollouts that begin alike are rewarded hardly more alike than others: this reward is mostly noise, or finds "
    "all of them alike"
)
"""What ``Guard.noise`` says."""

_REPEATED = "answers repeat themselves: the control and its strength are halved"


class Guard:
    """Compares each iteration with the first that it is shown, and unfinished rollouts with what text is like."""

    def __init__(self) -> None:
        self._base: tuple[float, float, float] | None = None  # mean and spread of the rewards (inf: of few), variety
        self._strikes = 0
        self._between, self._within = np.zeros(2), np.zeros(2)  # variance and degrees of freedom, of all pauses
        self._noise = False
        self._repeating = False  # in the iteration that runs

    def compare(self, parents: npt.NDArray[np.int64], rewards: npt.NDArray[np.float64]) -> None:
        """``rewards`` [n] of rollouts that begin alike where their ``parents`` [n] are the same: for ``noise``."""
        finite = np.isfinite(rewards)
        groups = [rewards[finite & (parents == parent)] for parent in np.unique(parents)]
        groups = [group for group in groups if len(group) > 1]
        total = float(np.concatenate(groups).var()) if len(groups) > 1 else 0.0
        if not total > 0:
            return
        sizes, means = np.array([len(group) for group in groups]), np.array([group.mean() for group in groups])
        within = float(sum(((group - mean) ** 2).sum() for group, mean in zip(groups, means, strict=True)))
        between = float((sizes * (means - np.average(means, weights=sizes)) ** 2).sum())
        # Each pause counts by its rollouts, whatever the spread of their rewards.
        self._between += between / total, len(groups) - 1
        self._within += within / total, sizes.sum() - len(groups)

    def noise(self) -> str | None:
        """Said once: siblings are rewarded no more alike than strangers (an F-test, R. A. Fisher 1925)."""
        (between, groups), (within, rest) = self._between, self._within
        if self._noise or groups < _FAMILIES or not within > 0:
            return None
        ratio = (between / groups) / (within / rest)
        self._noise = bool(ratio < 1.0 + _CHANCE * np.sqrt(2 / groups + 2 / rest))
        return MOSTLY_NOISE if self._noise else None

    def glance(self, tokens: Sequence[npt.NDArray[np.int32]]) -> Verdict | None:
        """At ``tokens`` of rollouts that pause, at most once an iteration.

        The first iteration has none to be compared with, but prose has hardly a trigram twice within a response: 0.94
        to 1.00 of them are different on the shipped models.
        """
        told = [row for row in tokens if len(row) >= _TELLING]
        if self._repeating or len(told) * 2 < len(tokens) or not told:
            return None
        self._repeating = float(np.mean([_variety(row) for row in told])) < _LOOPING
        return Verdict(0.5, _REPEATED) if self._repeating else None

    def look(self, rewards: npt.NDArray[np.float64], tokens: Sequence[npt.NDArray[np.int32]]) -> Verdict | None:
        """``rewards`` [n] and ``tokens`` of an iteration's rollouts; None: all is well."""
        repeating, self._repeating = self._repeating, False
        finite = rewards[np.isfinite(rewards)]
        if not len(finite):
            return None
        mean, variety = float(finite.mean()), float(np.mean([_variety(row) for row in tokens]))
        if self._base is None:
            self._base = mean, float(finite.std()) if len(finite) >= _ENOUGH else float("inf"), variety
            return None
        base_mean, spread, base_variety = self._base
        worse = len(finite) >= _ENOUGH and mean < base_mean - _WORSE * spread
        self._strikes = self._strikes + 1 if worse else 0
        if self._strikes == _STRIKES:
            self._strikes = 0
            return Verdict(0.0, "steering made answers worse than it found them: begun anew, with half the strength")
        repeats = variety < _VARIETY * base_variety and np.mean([len(row) for row in tokens]) >= _TELLING
        return Verdict(0.5, _REPEATED) if repeats and not repeating else None


def _variety(tokens: npt.NDArray[np.int32]) -> float:
    """Share of the trigrams that are different; 1 for a response too short to have two."""
    grams = [tuple(tokens[i : i + 3].tolist()) for i in range(len(tokens) - 2)]
    return len(set(grams)) / len(grams) if grams else 1.0
