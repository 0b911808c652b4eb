"""Likeness to a reference text."""

from __future__ import annotations

import numpy as np

from aisp_local.errors import RewardError
from aisp_local.rewards.rules.base import Rule, choice, flag
from aisp_local.rewards.rules.ngrams import Ids, codes, orders
from aisp_local.rewards.rules.unicode import composed
from aisp_local.rewards.rules.units import words
from aisp_local.rewards.text import clean

_ORDERS = {"characters": 6, "words": 1}
_BETA = {"characters": 2.0, "words": 1.0}  # characters: recall counts twice, as in chrF2


class Similarity(Rule):
    """F - 1: from 0, the same text, to -1, nothing in common.

    ``on = "characters"``: F is chrF2, n-grams of 1 to 6 characters without blanks. ``"words"``: F1 of the words.
    """

    def __init__(self, *, reference: str, on: str = "characters", ignore_case: bool = True) -> None:
        self._on = choice("on", on, tuple(_ORDERS))
        self._ignore_case = flag("ignore_case", ignore_case)
        units = self._units(composed(clean(reference))) if isinstance(reference, str) else []
        if not any(units):
            raise RewardError(f"'reference' is {reference!r}; give a text with something in it")
        self._reference = units
        self.name = f"similarity of {on}"

    def _units(self, text: str) -> list[str]:
        text = text.lower() if self._ignore_case else text
        return words(text) if self._on == "words" else ["".join(text.split())]

    def one(self, text: str) -> float:
        beta = _BETA[self._on] ** 2
        reference, response = self._numbers(text)
        n = len(reference)
        # The separator is a unit of its own, so that no n-gram across it is like another.
        joined = np.concatenate([reference, [-1], response])
        found = []
        for order, ids in enumerate(orders(joined, min(_ORDERS[self._on], n)), start=1):
            kinds = int(ids.max()) + 1
            mine = np.bincount(ids[: n - order + 1], minlength=kinds)
            theirs = np.bincount(ids[n + 1 :], minlength=kinds)
            common = int(np.minimum(mine, theirs).sum())
            # F = (1 + b^2) P R / (b^2 P + R) with P = common / theirs, R = common / mine
            found.append((1 + beta) * common / (beta * int(mine.sum()) + int(theirs.sum())))
        return float(np.mean(found)) - 1.0

    def _numbers(self, text: str) -> tuple[Ids, Ids]:
        response = self._units(text)
        if self._on == "characters":
            return codes(self._reference[0]), codes(response[0])
        known: dict[str, int] = {}
        mine, theirs = (
            np.array([known.setdefault(word, len(known)) for word in side], np.int64)
            for side in (self._reference, response)
        )
        return mine, theirs
