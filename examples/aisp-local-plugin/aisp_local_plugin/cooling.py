"""Best-of-n that samples more carefully from iteration to iteration."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from aisp_local.errors import InputError
from aisp_local.types import ControllerInfo, Controls, Rollouts, Sampling


class Cooling:
    """Samples of the model alone, the first iteration at ``hottest``, each later one halfway to ``coldest``.

    aisp-local gives a controller ``d``, ``max_tokens``, ``seed`` and ``prompt_index``; other parameters are options.
    """

    name = "cooling"

    def __init__(
        self,
        *,
        d: int,
        max_tokens: int,
        seed: int,
        prompt_index: int = 0,
        hottest: float = 1.0,
        coldest: float = 0.3,
    ) -> None:
        if not 0.0 < coldest <= hottest:
            raise InputError(f"coldest is {coldest} and hottest {hottest}; give 0 < coldest <= hottest")
        self._temperature, self._coldest = hottest, coldest

    def ask(self, n: int) -> Controls:
        return Controls(n=n, sampling=Sampling(self._temperature, min_p=0.02))

    def tell(self, rollouts: Rollouts, rewards: npt.NDArray[np.float64]) -> ControllerInfo:
        self._temperature = (self._temperature + self._coldest) / 2
        return ControllerInfo()
