"""What every rule is: 0 where all is as asked for, and one less for each violated unit."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from aisp_local.errors import RewardError
from aisp_local.rewards.rules.unicode import composed
from aisp_local.rewards.text import clean
from aisp_local.types import Prompt


class Rule(ABC):
    """A reward that needs no model: a function of the response's text alone, the same at every call.

    0 is the best score; each violated unit takes 1 away, parts of a unit their part. What a unit is, and where there
    is a worst score, the rule's docstring says. The keyword arguments of a rule are its keys in a TOML file, and the
    RewardError that it raises for a bad one begins with the key.
    """

    background = True
    prefix = False  # whether the score means something before the response has ended
    unfinished = True  # whether a search may go by it then: those that begin better end better
    PATHS: ClassVar[tuple[str, ...]] = ()  # keys that are paths, relative to the TOML file
    COMPOSED: ClassVar[bool] = True  # whether responses are read in composed letters (NFC)

    name: str

    def score(self, prompt: Prompt, responses: Sequence[str]) -> npt.NDArray[np.float32]:
        """Scores [n]."""
        read = (clean(response) for response in responses)
        scores = np.array([self.one(composed(text) if self.COMPOSED else text) for text in read], np.float32)
        return scores + np.float32(0)  # no -0

    @abstractmethod
    def one(self, text: str) -> float:
        """The score of one response, which is valid Unicode of any length, empty included."""


def target(key: str, value: object, low: float = 0.0) -> tuple[float, float]:
    """A range ``[least, most]``, ``most`` perhaps infinite. Raises RewardError."""
    if isinstance(value, (list, tuple)) and len(value) == 2 and all(map(_is_number, value)):
        least, most = float(value[0]), float(value[1])
        if low <= least <= most and least < math.inf:
            return least, most
    raise RewardError(f"{key!r} is {value!r}; give a range [least, most], as in [20, 60] or [20, inf]")


def positive(key: str, value: object) -> float:
    """A finite number greater than 0. Raises RewardError."""
    if not _is_number(value) or not 0 < float(value) < math.inf:  # type: ignore[arg-type]
        raise RewardError(f"{key!r} is {value!r}; it must be a number greater than 0")
    return float(value)  # type: ignore[arg-type]


def whole(key: str, value: object, least: int, most: int) -> int:
    """A whole number in a range. Raises RewardError."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise RewardError(f"{key!r} is {value!r}; it must be a whole number from {least} to {most}")
    return value


def flag(key: str, value: object) -> bool:
    """Raises RewardError for what is neither true nor false."""
    if not isinstance(value, bool):
        raise RewardError(f"{key!r} is {value!r}; it must be true or false")
    return value


def choice(key: str, value: object, choices: Sequence[str]) -> str:
    """One of some words. Raises RewardError."""
    if not isinstance(value, str) or value not in choices:
        raise RewardError(f"{key!r} is {value!r}; use one of {', '.join(choices)}")
    return value


def texts(key: str, value: object) -> tuple[str, ...]:
    """A list of texts, none of them blank. Raises RewardError."""
    if not isinstance(value, (list, tuple)) or not all(isinstance(one, str) and one.strip() for one in value):
        raise RewardError(f"{key!r} is {value!r}; give a list of texts, none of them empty")
    return tuple(clean(one) for one in value)


def outside(value: float, least: float, most: float) -> float:
    """How far a value lies outside a range, 0 inside."""
    return max(0.0, least - value, value - most)


def _is_number(value: object) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return not math.isnan(value)
    except OverflowError:  # a whole number that no float holds
        return False
