"""The base model's laws of the next token under a held control, on the few tokens of each step that could be drawn.

With y the change of a step's logits, divided by the temperature, the base law p becomes ``p_u ~ p exp(y)``. So the
divergences below are exact among a step's entries, and none needs the vocabulary.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from aisp_local.types import FloatArray, Laws

Array = npt.NDArray[np.float64]


class Steps:
    """The steps of some rollouts. Entries [K] are those of ``Laws``; sums are over the entries of a step."""

    def __init__(self, laws: Laws) -> None:
        self._base = laws.base.astype(np.float64)
        begins = np.empty(len(laws), np.bool_)
        begins[:1] = True
        begins[1:] = (laws.row[1:] != laws.row[:-1]) | (laws.step[1:] != laws.step[:-1])
        self._starts = np.flatnonzero(begins)
        self._sizes = np.diff(np.append(self._starts, len(laws)))

    @property
    def count(self) -> int:
        return len(self._starts)

    def divergence(self, y: FloatArray) -> float:
        """Mean over the steps of ``KL(p exp(y) || p)``, the first normalised, p the base law."""
        y = y - np.repeat(np.maximum.reduceat(y, self._starts), self._sizes)
        weights = self._base * np.exp(y, dtype=np.float64)
        norm = self._sum(weights)
        return max(0.0, float((self._sum(weights * y) / norm - np.log(norm)).mean()))  # not below it by rounding

    def variance(self, y: FloatArray) -> float:
        """Mean over the steps of Var_p(y), p the base law: twice the divergence of a small y."""
        first = self._sum(self._base * y)
        return float((self._sum(self._base * np.square(y, dtype=np.float64)) - first * first).mean())

    def _sum(self, values: Array) -> Array:
        return np.add.reduceat(values, self._starts)
