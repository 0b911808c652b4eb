"""The seam between a search and what it wants."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from aisp_local.errors import AispError, ScoreError
from aisp_local.types import Prompt


@runtime_checkable
class Reward(Protocol):
    """Scores responses to a prompt: higher is better.

    One with an attribute ``background`` that is true is called from another thread and for a few responses at a time,
    while the rest still decode; else it gets all responses of an iteration at once.
    """

    @property
    def name(self) -> str:
        """What messages and results call it."""

    def score(self, prompt: Prompt, responses: Sequence[str]) -> npt.NDArray[np.float32]:
        """Scores [n] of n responses; ``prompt`` is plain text or messages, never a rendered template."""


def call(
    name: str, function: Callable[[Prompt, Sequence[str]], Any], prompt: Prompt, responses: Sequence[str]
) -> npt.NDArray[np.float64]:
    """Scores [n] from code that may be anybody's, a reward's ``score`` or a plain function.

    Raises ScoreError, chained, when it raises anything but an error of ours, or gives no numbers of that shape.
    """
    try:
        result = function(prompt, list(responses))
    except AispError:
        raise
    except Exception as error:
        raise ScoreError(f"the reward {name!r} failed ({_said(error)})") from error
    try:
        scores = np.asarray(result, dtype=np.float64)
    except Exception as error:  # foreign arrays convert themselves, and raise what they like
        raise ScoreError(f"the reward {name!r} gave something that is not numbers ({_said(error)})") from error
    if scores.shape != (len(responses),):
        raise ScoreError(
            f"the reward {name!r} gave scores of the shape {scores.shape} for {len(responses)} responses; "
            "it must give one number each"
        )
    return scores


def _said(error: Exception) -> str:
    """The exception's kind and what it says."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
