"""How easily a response reads."""

from __future__ import annotations

from collections.abc import Sequence

from aisp_local.rewards.rules.base import Rule, outside, positive, target
from aisp_local.rewards.rules.units import sentences, syllables, words

HARDEST, EASIEST = -100.0, 121.22


def reading_ease(text: str) -> float:
    """Flesch's reading ease of English, -100 to 121.22, higher is easier; -100 of a text without words."""
    found = words(text)
    if not found:
        return HARDEST
    ease = 206.835 - 1.015 * len(found) / max(1, sentences(text)) - 84.6 * sum(map(syllables, found)) / len(found)
    return min(EASIEST, max(HARDEST, ease))


class Readability(Rule):
    """-1 for every ``unit`` points of Flesch's reading ease outside the range ``ease``. English only.

    Around 90: children's books; 60 to 70: plain English; below 30: academic prose. ``unit``: 10 points unless given.
    """

    def __init__(self, *, ease: Sequence[float], unit: float = 10.0) -> None:
        self._range = target("ease", ease, low=HARDEST)
        self._unit = positive("unit", unit)
        self.name = f"ease {self._range[0]:g}-{self._range[1]:g}"

    def one(self, text: str) -> float:
        return -outside(reading_ease(text), *self._range) / self._unit
