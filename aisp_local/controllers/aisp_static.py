"""AISP whose mean is never updated: what the exploration of the published method gives by itself."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from aisp_local.controllers.noise import trajectories
from aisp_local.errors import InputError
from aisp_local.seeds import RowSeeds
from aisp_local.types import ControllerInfo, Controls, FloatArray, Rollouts, Sampling


class AispStatic:
    """``v_t^i ~ N(0, sigma^2 I)`` in every iteration; nothing is learnt.

    Options: ``sigma``, ``window`` (control steps T, default max_tokens), ``temperature`` (0: greedy under the
    perturbation), ``mean`` [T, d] (in place of 0; it stays as it is).
    """

    name = "aisp-static"

    def __init__(
        self,
        *,
        d: int,
        max_tokens: int,
        seed: int,
        prompt_index: int = 0,
        sigma: float = math.sqrt(0.5),
        window: int | None = None,
        temperature: float = 0.0,
        mean: FloatArray | None = None,
    ) -> None:
        self._steps, self._d = max_tokens if window is None else min(window, max_tokens), d
        if sigma < 0 or not math.isfinite(sigma):
            raise InputError(f"sigma is {sigma}; it must be 0 or greater")
        if self._steps < 1:
            raise InputError(f"the control window is {self._steps} steps; it must be at least 1")
        if mean is not None and mean.shape != (self._steps, d):
            raise InputError(f"the mean has the shape {mean.shape}; it must be {(self._steps, d)}")
        self._mean = mean
        self._sigma, self._seed, self._prompt_index = sigma, seed, prompt_index
        self._sampling = Sampling(temperature)
        self._noise: FloatArray | None = None  # of the next iteration, where it was prepared
        self._iteration = 0

    def prepare(self, n: int) -> None:
        """Draw the noise of the next ``ask(n)``: most of its time."""
        self._noise = self._draw(n)

    def _draw(self, n: int) -> FloatArray:
        seeds = RowSeeds(self._seed, self._prompt_index, self._iteration + 1)
        return trajectories(seeds, n, self._steps, self._d, self._sigma)

    def ask(self, n: int) -> Controls:
        v, self._noise = self._noise, None
        if v is None or len(v) != n:
            v = self._draw(n)
        self._iteration += 1
        if self._mean is not None:
            v += self._mean
        return Controls(n=n, vectors=v, sampling=self._sampling)

    def tell(self, rollouts: Rollouts, rewards: npt.NDArray[np.float64]) -> ControllerInfo:
        return ControllerInfo()
