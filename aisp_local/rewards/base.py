"""The seam between a search and what it wants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from aisp_local.errors import ScoreError
from aisp_local.types import Prompt


@runtime_checkable
class Reward(Protocol):
    """Scores responses to a prompt: higher is better."""

    @property
    def name(self) -> str:
        """What messages and results call it."""

    def score(self, prompt: Prompt, responses: Sequence[str]) -> npt.NDArray[np.float32]:
        """Scores [n] of n responses; ``prompt`` is plain text or messages, never a rendered template."""


def check_count(name: str, scores: npt.NDArray[Any], n: int) -> None:
    """Raises ScoreError unless ``scores`` has the shape [n]."""
    if scores.shape != (n,):
        raise ScoreError(
            f"the reward {name!r} gave scores of the shape {scores.shape} for {n} responses; "
            "it must give one number each"
        )
