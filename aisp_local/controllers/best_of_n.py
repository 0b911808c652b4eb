"""Best-of-n: no control at all, independent samples of the base model."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from aisp_local.types import ControllerInfo, Controls, Rollouts, Sampling


class BestOfN:
    """Samples at ``temperature`` (and ``top_k``, ``top_p``, ``min_p``); the best reward wins."""

    name = "best-of-n"

    def __init__(
        self,
        *,
        d: int,
        max_tokens: int,
        seed: int,
        prompt_index: int = 0,
        temperature: float = 0.7,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
    ) -> None:
        self._sampling = Sampling(temperature, top_k, top_p, min_p)

    def ask(self, n: int) -> Controls:
        return Controls(n=n, sampling=self._sampling)

    def tell(self, rollouts: Rollouts, rewards: npt.NDArray[np.float64]) -> ControllerInfo:
        return ControllerInfo()
