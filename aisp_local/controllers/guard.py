"""A guard against too much steering: it looks at what rollouts became, whatever their nats are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_STRIKES = 2  # iterations in a row that are worse than the first
_WORSE = 2.0  # by so many of its standard deviations
_VARIETY = 0.8  # of the first iteration's: below it, answers repeat themselves
_TELLING = 24  # tokens: of shorter answers variety says little


@dataclass(frozen=True)
class Verdict:
    """What to do: multiply the control with ``factor``."""

    factor: float
    note: str


class Guard:
    """Compares each iteration with the first that it is shown."""

    def __init__(self) -> None:
        self._base: tuple[float, float, float] | None = None  # mean and spread of the rewards, variety
        self._strikes = 0

    def look(self, rewards: npt.NDArray[np.float64], tokens: Sequence[npt.NDArray[np.int32]]) -> Verdict | None:
        """``rewards`` [n] and ``tokens`` of an iteration's rollouts; None: all is well."""
        finite = rewards[np.isfinite(rewards)]
        if not len(finite):
            return None
        mean, variety = float(finite.mean()), float(np.mean([_variety(row) for row in tokens]))
        if self._base is None:
            self._base = mean, float(finite.std()), variety
            return None
        base_mean, spread, base_variety = self._base
        self._strikes = self._strikes + 1 if mean < base_mean - _WORSE * spread else 0
        if self._strikes == _STRIKES:
            self._strikes = 0
            return Verdict(0.0, "steering made answers worse than it found them: begun anew, with half the strength")
        if variety < _VARIETY * base_variety and np.mean([len(row) for row in tokens]) >= _TELLING:
            return Verdict(0.5, "answers repeat themselves: the control and its strength are halved")
        return None


def _variety(tokens: npt.NDArray[np.int32]) -> float:
    """Share of the trigrams that are different; 1 for a response too short to have two."""
    grams = [tuple(tokens[i : i + 3].tolist()) for i in range(len(tokens) - 2)]
    return len(set(grams)) / len(grams) if grams else 1.0
