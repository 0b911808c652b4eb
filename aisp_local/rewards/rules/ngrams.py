"""N-grams as numbers: exact, and fast enough for a million characters."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]


def codes(text: str) -> Ids:
    """The code points of a text, [n]."""
    return np.frombuffer(text.encode("utf-32-le"), "<u4").astype(np.int64)


def orders(units: Ids, longest: int) -> Iterator[Ids]:
    """For each order 1 to ``longest`` the ids [len(units) - order + 1] of the n-grams: equal where these are equal."""
    _, first = np.unique(units, return_inverse=True)
    ids = first = first.astype(np.int64)
    base = int(first.max(initial=0)) + 1
    for order in range(1, longest + 1):
        if order > 1:
            _, ids = np.unique(ids[:-1] * base + first[order - 1 :], return_inverse=True)
        yield ids.astype(np.int64)
