"""What later rollouts begin with: parts of the best ones so far."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int32]


class Beginnings:
    """The ``size`` best responses; a beginning is one of them, cut at a place that is as likely anywhere."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._best: list[tuple[float, Tokens]] = []

    def __len__(self) -> int:
        return len(self._best)

    def add(self, rewards: npt.NDArray[np.float64], tokens: Sequence[Tokens]) -> None:
        """Rewards that are not finite are left out; of equals the earlier stays in front."""
        kept = [(float(reward), row) for reward, row in zip(rewards, tokens, strict=True) if np.isfinite(reward)]
        self._best = sorted(self._best + kept, key=lambda one: -one[0])[: self._size]

    def draw(self, generator: np.random.Generator) -> Tokens:
        """At most all but the last token of one of the best."""
        _, tokens = self._best[int(generator.integers(len(self._best)))]
        return tokens[: int(generator.integers(max(1, len(tokens))))]
