"""ARGS: at every step the reward of each of the likeliest tokens decides, beside its logit (arXiv 2402.01694)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from aisp_local.errors import InputError
from aisp_local.types import ControllerInfo, Controls, FloatArray, Rollouts, Sampling, Step

Array = npt.NDArray[np.float64]
Tokens = npt.NDArray[np.int32]


class Args:
    """Of the ``candidates`` likeliest tokens c of a step, after the response y so far:

        s(c) = logit(c) + weight * r(y c),

    greedily the one of the highest s, or with a ``temperature`` one drawn with ``softmax(s / temperature)``. The reward
    reads ``candidates`` unfinished responses a step and row: ``IterationStats.n_scored`` counts them.

    ``score``: rewards of unfinished responses; ``text``: what tokens say.
    Options: ``weight`` (logits a unit of reward), ``candidates``, ``temperature`` (0: greedy, and every row alike).
    """

    name = "args"

    def __init__(
        self,
        *,
        d: int,
        max_tokens: int,
        seed: int,
        score: Callable[[Sequence[str]], Array] | None = None,
        text: Callable[[Tokens], str] | None = None,
        prompt_index: int = 0,
        unfinished: bool = True,
        weight: float = 1.0,
        candidates: int = 10,
        temperature: float = 1.0,
    ) -> None:
        if not math.isfinite(weight):
            raise InputError(f"weight is {weight}; it must be a number")
        if candidates < 1:
            raise InputError(f"candidates is {candidates}; it must be at least 1")
        if not (temperature >= 0 and math.isfinite(temperature)):
            raise InputError(f"temperature is {temperature}; it must be 0 (greedy) or greater")
        if not unfinished:
            raise InputError(
                "args needs scores of unfinished responses, which this reward cannot give; use another method"
            )
        self._score, self._text = score, text
        self._weight, self._candidates, self._temperature = weight, candidates, temperature
        self._scored, self._seconds = 0, 0.0

    @property
    def needs_prelogits(self) -> bool:
        return False

    def ask(self, n: int) -> Controls:
        return Controls(n=n, sampling=Sampling(self._temperature), processor=self)

    def __call__(self, step: Step) -> FloatArray:
        """Scores in the place of the candidates' logits; see types.LogitsProcessor."""
        if self._score is None or self._text is None:
            raise InputError("args was made without a reward to ask")
        m, size = step.logits.shape
        k = min(self._candidates, size)
        found = np.argpartition(step.logits, size - k, axis=1)[:, size - k :]
        texts = [
            self._text(np.append(so_far, token).astype(np.int32))
            for so_far, row in zip(step.tokens, found, strict=True)
            for token in row
        ]
        began = time.perf_counter()
        rewards = np.asarray(self._score(texts), np.float64).reshape(m, k)
        self._scored, self._seconds = self._scored + len(texts), self._seconds + time.perf_counter() - began
        usable = np.isfinite(rewards)
        scores = np.take_along_axis(step.logits, found, axis=1) + self._weight * np.where(usable, rewards, 0.0)
        # One without a score is no candidate, unless none has any.
        scores = np.where(usable | ~usable.any(axis=1, keepdims=True), scores, -np.inf)
        result = np.full((m, size), -np.inf, np.float32)
        np.put_along_axis(result, found, scores.astype(np.float32), axis=1)
        return result

    def tell(self, rollouts: Rollouts, rewards: Array) -> ControllerInfo:
        scored, seconds, self._scored, self._seconds = self._scored, self._seconds, 0, 0.0
        return ControllerInfo(n_scored=scored, reward_seconds=seconds)
