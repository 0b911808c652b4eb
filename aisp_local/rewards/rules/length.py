"""How long a response may be."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from aisp_local.errors import RewardError
from aisp_local.rewards.rules.base import Rule, outside, positive, target
from aisp_local.rewards.rules.units import sentences, words

_COUNTS: dict[str, tuple[Callable[[str], int], float]] = {
    "words": (lambda text: len(words(text)), 10.0),
    "characters": (lambda text: len(text.strip()), 50.0),
    "sentences": (sentences, 1.0),
}


class Length(Rule):
    """-1 for every ``unit`` words, characters or sentences too few or too many.

    Give one of the three as a range ``[least, most]``. ``unit``: 10 words, 50 characters or 1 sentence unless given.
    """

    unfinished = False

    def __init__(
        self,
        *,
        words: Sequence[float] | None = None,
        characters: Sequence[float] | None = None,
        sentences: Sequence[float] | None = None,
        unit: float | None = None,
    ) -> None:
        given = {"words": words, "characters": characters, "sentences": sentences}
        given = {key: value for key, value in given.items() if value is not None}
        if len(given) != 1:
            raise RewardError("a length needs exactly one of 'words', 'characters' and 'sentences'")
        ((key, value),) = given.items()
        self._range = target(key, value)
        self._count, usual = _COUNTS[key]
        self._unit = usual if unit is None else positive("unit", unit)
        self.name = f"{key} {self._range[0]:g}-{self._range[1]:g}"

    def one(self, text: str) -> float:
        return -outside(self._count(text), *self._range) / self._unit
