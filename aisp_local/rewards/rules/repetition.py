"""Responses that say the same again and again."""

from __future__ import annotations

import numpy as np

from aisp_local.rewards.rules.base import Rule, whole
from aisp_local.rewards.rules.ngrams import orders
from aisp_local.rewards.rules.units import words


class Repetition(Rule):
    """Minus the share of the ``n``-grams of words that occurred before in the response: 0 to -1. Case is ignored."""

    prefix = True

    def __init__(self, *, n: int = 3) -> None:
        self._n = whole("n", n, 1, 20)
        self.name = f"repetition {n}"

    def one(self, text: str) -> float:
        found = words(text.lower())
        if len(found) < self._n:
            return 0.0
        known: dict[str, int] = {}
        units = np.array([known.setdefault(word, len(known)) for word in found], np.int64)
        *_, ids = orders(units, self._n)
        return float((int(ids.max()) + 1) / len(ids) - 1.0)
