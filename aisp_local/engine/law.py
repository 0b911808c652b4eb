"""What follows from an output head: the law of the next token, its score function and its Fisher matrix."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import numpy.typing as npt

from aisp_local.types import FloatArray

_BYTES = 2**24  # of logits at a time
_LARGE = 2**26  # entries of a matrix


class HeadLaw(ABC):
    """``logits = softcap(gain W z + b)``; see types.Head."""

    softcap: float = 0.0
    gain: float = 1.0

    @property
    @abstractmethod
    def weight(self) -> FloatArray:
        """W [V, d]."""

    def take(self, tokens: npt.NDArray[np.integer[Any]]) -> FloatArray:
        """Rows of W [k, d]."""
        return np.asarray(self.weight[tokens])

    def shift(self, u: FloatArray) -> FloatArray:
        """What u [d] adds to the logits [V]; of soft-capped ones to first order."""
        weight = self.weight
        # BLAS only where it pays: its threads spin on the cores that decode next.
        added = weight @ u if weight.size > _LARGE else np.einsum("vd,d->v", weight, u)
        return np.asarray(added * np.float32(self.gain))

    @abstractmethod
    def logits(self, prelogits: FloatArray) -> FloatArray:
        """Base logits [N, V]."""

    def law(self, prelogits: FloatArray, temperature: float) -> FloatArray:
        """Probabilities [N, V] of pre-logits [N, d] at the temperature, without truncation."""
        p = self.logits(prelogits)
        p /= np.float32(temperature)
        p -= p.max(axis=1, keepdims=True)
        np.exp(p, out=p)
        p /= p.sum(axis=1, keepdims=True)
        return p

    def score(self, prelogits: FloatArray, tokens: npt.NDArray[np.int32], temperature: float) -> FloatArray:
        """Gradient of ``log p(token)`` by the pre-logits [N, d], ``J^T (e_token - p) / temperature``.

        ``prelogits`` [N, d], ``tokens`` [N]; p is the law at the temperature, J the head's Jacobian.
        """
        result = np.empty(prelogits.shape, np.float32)
        rows = max(1, _BYTES // (4 * len(self.weight)))
        for start in range(0, len(prelogits), rows):
            part = slice(start, start + rows)
            cotangent = self.law(prelogits[part], temperature)
            np.negative(cotangent, out=cotangent)
            cotangent[np.arange(len(cotangent)), tokens[part]] += 1.0
            if self.softcap:
                cotangent *= 1.0 - np.square(self.logits(prelogits[part]) / self.softcap)
            result[part] = cotangent @ self.weight
        result *= np.float32(self.gain / temperature)
        return result

    def fisher(self, vectors: FloatArray, law: FloatArray, temperature: float) -> FloatArray:
        """``F u`` [N, d] of vectors u [N, d] under laws p [N, V]: ``W^T (p * y - p (p . y))``, ``y = W u``.

        With the head's scale, and the temperature's, squared; a soft-cap is taken as one of slope 1.
        """
        y = vectors @ self.weight.T
        y -= np.einsum("nv,nv->n", law, y)[:, None]
        y *= law
        return np.asarray((y @ self.weight) * np.float32((self.gain / temperature) ** 2))
