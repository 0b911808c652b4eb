"""A reward for answers of about forty words."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from aisp_local.types import Prompt


class Brevity:
    """Minus the distance to ``words``, in tens of words."""

    name = "brevity"
    unfinished = False  # the length of what is not finished says nothing

    def __init__(self, words: int = 40) -> None:
        self._words = words

    def score(self, prompt: Prompt, responses: Sequence[str]) -> npt.NDArray[np.float32]:
        return np.array([-abs(len(text.split()) - self._words) / 10 for text in responses], np.float32)


def brevity() -> Brevity:
    """What the entry point names: a function without arguments that gives the reward."""
    return Brevity()
