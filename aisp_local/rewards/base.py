"""The seam between a search and what it wants."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from aisp_local.errors import AispError, ScoreError
from aisp_local.types import Calibration, Prompt


@runtime_checkable
class Reward(Protocol):
    """Scores responses to a prompt: higher is better.

    One with an attribute ``background`` that is true is called from another thread and for a few responses at a time,
    while the rest still decode; else it gets all at once that end, or pause, together. With ``args``, which asks while
    rows decode, such a reward may be asked from two threads at a time. One with an attribute ``prefix`` that is true
    knows what to make of an unfinished response (see ``score_prefixes``); one with an attribute ``unfinished`` that is
    false is not asked for them by a search.
    """

    @property
    def name(self) -> str:
        """What messages and results call it."""

    def score(self, prompt: Prompt, responses: Sequence[str]) -> npt.NDArray[np.float32]:
        """Scores [n] of n responses; ``prompt`` is plain text or messages, never a rendered template."""


@runtime_checkable
class Parted(Protocol):
    """A reward made of parts, whose scores are kept beside its own."""

    def score_parts(
        self, prompt: Prompt, responses: Sequence[str]
    ) -> tuple[npt.NDArray[np.float64], Mapping[str, npt.NDArray[np.float64]]]:
        """Scores [n], and those [n] of each part by its name, as the part gave them."""


@runtime_checkable
class Calibrates(Protocol):
    """A reward whose scale is measured on responses of the base model before a search."""

    @property
    def rollouts(self) -> int:
        """How many responses it wants to see."""

    @property
    def calibration(self) -> Calibration | None:
        """What it was calibrated to; None where it was not, or needs none."""

    @property
    def uncalibrated(self) -> bool:
        """Whether it cannot score yet."""

    def calibrate(self, prompt: Prompt, responses: Sequence[str]) -> Reward:
        """The same reward, calibrated on responses to a prompt, in whatever order."""

    def with_calibration(self, calibration: Calibration) -> Reward:
        """The same reward, calibrated as another one was."""


_asked: set[str] = set()
"""Names of rewards that were asked for scores of unfinished responses without being made for it."""


def score_prefixes(reward: Reward, prompt: Prompt, prefixes: Sequence[str]) -> npt.NDArray[np.float64]:
    """Scores [n] of responses that are not finished: of ``reward.score_prefixes`` where there is one, else ``score``.

    Warns, once for each name, if the reward does not say that it can (``prefix``): it was not trained for it.
    Raises ScoreError, as ``call``.
    """
    if not getattr(reward, "prefix", False) and reward.name not in _asked:
        _asked.add(reward.name)
        warnings.warn(
            f"the reward {reward.name!r} was not trained to score unfinished responses; its scores of them may mislead",
            stacklevel=2,
        )
    return call_prefixes(reward, prompt, prefixes)


def call_prefixes(reward: Reward, prompt: Prompt, prefixes: Sequence[str]) -> npt.NDArray[np.float64]:
    """``score_prefixes`` without its warning, for methods that watch whether such scores are of use."""
    return call(reward.name, getattr(reward, "score_prefixes", reward.score), prompt, prefixes)


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


def call_parts(
    reward: Reward, prompt: Prompt, responses: Sequence[str]
) -> tuple[npt.NDArray[np.float64], Mapping[str, npt.NDArray[np.float64]]]:
    """``call`` of a reward's ``score``, with the scores [n] of its parts, if it has any."""
    if isinstance(reward, Parted):
        found: dict[str, npt.NDArray[np.float64]] = {}

        def score(prompt: Prompt, responses: Sequence[str]) -> Any:
            scores, parts = reward.score_parts(prompt, responses)
            found.update(parts)
            return scores

        return call(reward.name, score, prompt, responses), found
    return call(reward.name, reward.score, prompt, responses), {}


def _said(error: Exception) -> str:
    """The exception's kind and what it says."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
