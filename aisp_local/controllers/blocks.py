"""Which unfinished rollouts are gone on with: where an iteration pauses, how many survive, and what that costs in nats.

Blockwise selection (arXiv 2310.17022) by a reward of unfinished responses, as sequential Monte Carlo does
(arXiv 2404.17546): at every pause the k best of n rollouts go on, each with as many copies as the others.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from functools import cache

import numpy as np
import numpy.typing as npt

from aisp_local.errors import InputError

Tokens = npt.NDArray[np.int32]

BLOCKS = 8
"""Blocks that a response of the expected length is cut into."""

_FIRST = 6  # tokens of the first block while no response has ended: answers may turn out to be short
_SHORTEST = 4  # tokens of a block
_LATER = 1.25  # times its tokens, where a response that is longer than expected pauses next
_GRID = 4096  # of quantiles


class Schedule:
    """Where rollouts pause, in tokens: each block as long as all before it, at most one of ``blocks`` of a response of
    the expected length, and beyond that length a quarter of what there is."""

    def __init__(self, max_tokens: int, blocks: int = BLOCKS) -> None:
        if blocks < 1:
            raise InputError(f"blocks is {blocks}; it must be at least 1")
        self._blocks = blocks
        self._max_tokens, self._expected = max_tokens, float(max_tokens)
        self._first = min(_FIRST, self.block)

    @property
    def expected(self) -> float:
        """Tokens of a response: the limit, until some have ended."""
        return self._expected

    @property
    def block(self) -> int:
        """Tokens of a block, but for the first ones."""
        return max(_SHORTEST, math.ceil(self._expected / self._blocks))

    def learn(self, lengths: Sequence[int]) -> None:
        """Of responses that ended."""
        if lengths:
            self._expected = float(np.mean(lengths))
            self._first = self.block

    def pause(self, position: int) -> int | None:
        """Where rollouts of so many tokens pause next; None: they run to their end."""
        at = position + max(self._first, min(position, self.block))
        if position >= self._expected:  # few are left, and they may be long
            at = max(at, math.ceil(_LATER * position))
        return at if at + self.block // 2 < self._max_tokens else None

    def count(self, begin: int = 0) -> int:
        """Pauses of a response of the expected length that has so many tokens, those that are to come."""
        position, pauses = self.pause(begin), 0
        while position is not None and position < self._expected:
            position, pauses = self.pause(position), pauses + 1
        return pauses


@cache
def selection_kl(n: int, k: int) -> float:
    """Nats between one of the k best of n independent draws, each as likely, and one draw; scores without ties.

    With q a draw's quantile its density is ``n / k P(fewer than k of n - 1 others are above q)``.
    """
    if k >= n:
        return 0.0
    q = (np.arange(_GRID) + 0.5) / _GRID
    above = np.arange(k)
    log_choose = np.array([math.lgamma(n) - math.lgamma(j + 1) - math.lgamma(n - j) for j in above])
    log_p = log_choose[:, None] + above[:, None] * np.log1p(-q) + (n - 1 - above)[:, None] * np.log(q)
    density = n / k * np.exp(log_p).sum(axis=0)
    density /= density.mean()
    return float((density * np.log(np.maximum(density, 1e-300))).mean())


def survivors(n: int, nats: float) -> int:
    """The fewest of n that may survive a pause within a budget of nats."""
    return bisect.bisect_left(range(1, n + 1), -max(nats, 0.0), key=lambda k: -selection_kl(n, k)) + 1


def select(scores: npt.NDArray[np.float64], tokens: Sequence[Tokens], k: int) -> list[int]:
    """The k best of some rollouts, the best first; of equals the earlier, and copies of others only to fill up.

    All, if none is better than another. Those whose scores are not finite only if there are no others.
    """
    finite = [i for i in range(len(scores)) if np.isfinite(scores[i])]
    if not finite or (k > 1 and float(np.ptp(scores[finite])) == 0.0):
        return list(range(len(scores)))
    seen: set[bytes] = set()
    distinct: list[int] = []
    copies: list[int] = []
    for i in sorted(finite, key=lambda i: -scores[i]):
        key = tokens[i].tobytes()
        (copies if key in seen else distinct).append(i)
        seen.add(key)
    return (distinct + copies)[:k]
