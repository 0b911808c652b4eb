"""The few statistics that tell what scores are worth. numpy only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def wilson(right: float, n: int) -> tuple[float, float]:
    """95% interval of a share (Wilson's score interval)."""
    z = 1.96
    p = right / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return float(centre - half), float(centre + half)


def share_right(scores: Array) -> float:
    """Share of the pairs [n, 2] whose first score is the higher one; ties count half."""
    return float(((np.sign(scores[:, 0] - scores[:, 1]) + 1) / 2).mean())


def auc(good: Sequence[float] | Array, bad: Sequence[float] | Array) -> float:
    """Probability that a good one scores above a bad one; ties count half."""
    ordered = np.sort(np.asarray(bad))
    below = np.searchsorted(ordered, good, "left") + np.searchsorted(ordered, good, "right")
    return float(below.mean() / (2 * len(ordered)))


def ranks(values: Array) -> Array:
    """Ranks [n] from 1 on; equal values share the mean of theirs."""
    ordered = np.sort(values)
    low, high = np.searchsorted(ordered, values, "left"), np.searchsorted(ordered, values, "right")
    return np.asarray((low + high + 1) / 2, np.float64)


def pearson(a: Array, b: Array) -> float:
    """Linear correlation; nan where one of them does not vary."""
    a, b = a - a.mean(), b - b.mean()
    norm = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / norm if norm > 0 else float("nan")


def spearman(a: Array, b: Array) -> float:
    """Correlation of the ranks."""
    return pearson(ranks(a), ranks(b))


def bradley_terry(margins: Array) -> Array:
    """Probability that the first is preferred, by the difference of the scores: 1 / (1 + exp(-margin))."""
    return np.asarray(0.5 * (1 + np.tanh(margins / 2)))
