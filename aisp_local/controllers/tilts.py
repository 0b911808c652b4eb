"""The base model's laws of the next token under a held control, on the few tokens of each step that could be drawn.

With y the change of a step's logits, divided by the temperature, the base law p becomes ``p_u ~ p exp(y)``, of which
min-p leaves ``q_u``. So the divergences below are exact among a step's entries, and none needs the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt

from aisp_local.types import FloatArray, Laws, Sampling

Array = npt.NDArray[np.float64]

_ROUNDING = 1e-5  # of a share: what lay at min-p's very edge was kept


class Steps:
    """The steps of some rollouts. Entries [K] are those of ``Laws``; sums are over the entries of a step.

    ``weights`` [steps]: what each counts in means, all alike without them; ``sampling``: of what was drawn, of which
    min-p cuts, before the temperature, what is less likely than so much of the likeliest.
    """

    def __init__(self, laws: Laws, sampling: Sampling, weights: Array | None = None) -> None:
        self._weights = weights
        self._base = laws.base.astype(np.float64)
        self._starts = np.flatnonzero(_begins(laws))
        self._sizes = np.diff(np.append(self._starts, len(laws)))
        self._cut = sampling.min_p ** (1.0 / sampling.temperature) * (1.0 - _ROUNDING)
        self._truncation = self._from_base(np.zeros(len(laws)))

    @property
    def count(self) -> int:
        return len(self._starts)

    def divergence(self, y: FloatArray) -> float:
        """Mean over the steps of ``KL(q_u || p) - KL(q_0 || p)``: beyond what min-p alone takes from the base law p.

        Infinite where y is.
        """
        if not np.isfinite(y).all():
            return math.inf
        return max(0.0, self._from_base(y.astype(np.float64)) - self._truncation)  # not below it by rounding

    def _from_base(self, y: Array) -> float:
        """Mean over the steps of ``KL(q_u || p)``."""
        y = y - np.repeat(np.maximum.reduceat(y, self._starts), self._sizes)
        weights = self._base * np.exp(y)
        if self._cut > 0.0:
            weights[weights < np.repeat(self._cut * np.maximum.reduceat(weights, self._starts), self._sizes)] = 0.0
        norm = self._sum(weights)
        return self._mean(self._sum(weights * y) / norm - np.log(norm))

    def variance(self, y: FloatArray) -> float:
        """Mean over the steps of Var_p(y), p the base law: twice the divergence of a small y."""
        first = self._sum(self._base * y)
        return self._mean(self._sum(self._base * np.square(y, dtype=np.float64)) - first * first)

    def _mean(self, values: Array) -> float:
        return float(np.average(values, weights=self._weights))

    def _sum(self, values: Array) -> Array:
        return np.add.reduceat(values, self._starts)


@dataclass(frozen=True)
class Sample:
    """Some steps of rollouts, each of which stands for ``each`` of them, a rollout."""

    laws: Laws
    each: float

    @classmethod
    def of(cls, laws: Laws, most: int, rollouts: int) -> Sample:
        """At most so many of the steps of one block, evenly, of an iteration of so many ``rollouts``."""
        index = np.cumsum(_begins(laws)) - 1  # of each entry's step
        # Odd, since steps come row by row, and rows are often a power of two.
        every = -(-int(index[-1] + 1) // most) | 1
        return cls(_some(laws, index % every == 0), every / rollouts)

    def after(self, step: int) -> Sample:
        """Those from some step of the rollouts on."""
        return replace(self, laws=_some(self.laws, self.laws.step >= step))

    @staticmethod
    def joined(samples: Sequence[Sample]) -> tuple[Laws, Array]:
        """The laws of some samples, no step in two of them, and the weights of the steps."""
        laws = Laws(*(np.concatenate([getattr(sample.laws, f.name) for sample in samples]) for f in fields(Laws)))
        weights = [np.full(np.count_nonzero(_begins(sample.laws)), sample.each) for sample in samples]
        return laws, np.concatenate(weights)


def _begins(laws: Laws) -> npt.NDArray[np.bool_]:
    """Which entries [K] are a step's first."""
    begins = np.empty(len(laws), np.bool_)
    begins[:1] = True
    begins[1:] = (laws.row[1:] != laws.row[:-1]) | (laws.step[1:] != laws.step[:-1])
    return begins


def _some(laws: Laws, kept: npt.NDArray[np.bool_]) -> Laws:
    return Laws(*(getattr(laws, f.name)[kept] for f in fields(Laws)))
