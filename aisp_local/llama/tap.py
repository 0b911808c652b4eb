"""What a plain completion does between two decode steps: it changes logits, notes them, and watches the tokens."""

from __future__ import annotations

import codecs
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from aisp_local.engine.sampling import log_softmax
from aisp_local.types import FloatArray, Step, TokenLogprob

Tokens = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Penalties:
    """Of llama.cpp: for the last ``last`` tokens of the answer."""

    last: int
    repeat: float = 1.0
    frequency: float = 0.0
    presence: float = 0.0

    @property
    def some(self) -> bool:
        return (self.repeat, self.frequency, self.presence) != (1.0, 0.0, 0.0)

    def apply(self, logits: FloatArray, tokens: Tokens) -> None:
        """To logits [V], in place."""
        if not self.some or not self.last:
            return
        counts = Counter(tokens[-self.last :].tolist())
        seen, count = np.array(list(counts), np.int64), np.array(list(counts.values()), np.float32)
        values = logits[seen]
        values = np.where(values <= 0, values * self.repeat, values / self.repeat)
        logits[seen] = values - count * self.frequency - self.presence


class Tap:
    """A logits processor of one rollout.

    ``processors`` and ``criteria`` are llama-cpp-python's: they get the prompt's and the answer's tokens, and logits
    [V]. ``top``: of how many tokens ``entries`` hold log-probabilities, None: no entries. ``told(tokens)``: after each.
    """

    needs_prelogits = False

    def __init__(
        self,
        prompt: Tokens,
        piece: Callable[[int], bytes],
        *,
        processors: Sequence[Callable[[Any, Any], Any]],
        penalties: Penalties,
        criteria: Callable[[Any, Any], bool] | None,
        top: int | None,
        told: Callable[[Tokens], None] | None,
    ) -> None:
        self._prompt, self._piece = prompt, piece
        self._processors, self._penalties = processors, penalties
        self._criteria, self._top, self._told = criteria, top, told
        self._last: npt.NDArray[np.float64] | None = None
        self.entries: list[TokenLogprob] = []
        self.stopped: int | None = None
        """The tokens that the answer had when the criteria ended it."""

    @property
    def needed(self) -> bool:
        """Whether it does anything: without it, steps are cheaper."""
        given = (self._criteria, self._top, self._told)
        return bool(self._processors) or self._penalties.some or any(each is not None for each in given)

    def __call__(self, step: Step) -> FloatArray:
        (tokens,) = step.tokens
        logits: FloatArray = step.logits[0].copy()
        if len(tokens):
            self.note(int(tokens[-1]))
            if self._told is not None:
                self._told(tokens)
        if self._top is not None:
            self._last = log_softmax(logits.astype(np.float64)[None])[0]
        so_far = np.concatenate([self._prompt, tokens]).astype(np.intc)
        for processor in self._processors:
            logits = np.asarray(processor(so_far, logits), np.float32)
        self._penalties.apply(logits, tokens)
        if self._criteria is not None and self.stopped is None and self._criteria(so_far, logits):
            self.stopped = len(tokens)
        return np.asarray(logits[None], np.float32)

    def note(self, token: int) -> None:
        """A token that was drawn from the logits before."""
        last, self._last = self._last, None
        if last is None or self._top is None:
            return
        top = np.argsort(-last, kind="stable")[: self._top].tolist()
        likeliest = tuple((self._piece(i), float(last[i])) for i in top)
        self.entries.append(TokenLogprob(self._piece(token), float(last[token]), likeliest))


class Settled:
    """The text of a growing answer, without what may become a stop string or half a character."""

    def __init__(self, piece: Callable[[int], bytes], stops: Sequence[str]) -> None:
        self._piece, self._stops = piece, [stop.encode() for stop in stops]
        self._data, self._read = bytearray(), 0

    def __call__(self, tokens: Tokens) -> str:
        for token in tokens[self._read :].tolist():
            self._data += self._piece(token)
        self._read = len(tokens)
        ends = [i for stop in self._stops for i in range(1, len(stop)) if self._data.endswith(stop[:i])]
        ready = bytes(self._data[: len(self._data) - max(ends, default=0)])
        return codecs.getincrementaldecoder("utf-8")("replace").decode(ready)
