"""AISP as published (arXiv 2510.26219): independent Gaussian noise on the pre-logits of every step."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from aisp_local.controllers.base import ITERATIONS
from aisp_local.controllers.noise import trajectories
from aisp_local.controllers.weights import effective_sample_size, length, log_weights, normalise
from aisp_local.errors import InputError
from aisp_local.seeds import RowSeeds
from aisp_local.types import ControllerInfo, Controls, FloatArray, Rollouts, Sampling


class Aisp:
    """``v_t^i ~ N(u_t, sigma^2 I)``; ``U <- sum_i w_i V^i`` (Eq. 14) with the weights of Eq. 13.

    Options: ``sigma``, ``lambda_`` (reward units), ``alpha`` (section 3.6: 1 drops the prior term),
    ``window`` (control steps T, default max_tokens), ``temperature`` (0: greedy under the perturbation).

    A control after the end of a response had no effect on it: such steps enter neither the prior term nor
    the update. At step t the weights are renormalised over the rollouts that were still running; where none
    was, u_t stays. The prior term is the whole log-ratio of the proposal N(u_t, sigma^2) to the relaxed prior
    N(alpha u_t, sigma^2) over the L_i steps of rollout i,

        (1 - alpha) / sigma^2 sum_{t<L_i} <u_t, v_t^i>  -  (1 - alpha^2) / (2 sigma^2) sum_{t<L_i} |u_t|^2,

    whose second sum the paper may drop, as there all responses are equally long and it cancels.
    """

    name = "aisp"
    iterations = ITERATIONS

    def __init__(
        self,
        *,
        d: int,
        max_tokens: int,
        seed: int,
        prompt_index: int = 0,
        sigma: float = math.sqrt(0.5),
        lambda_: float = 0.3,
        alpha: float = 0.999,
        window: int | None = None,
        temperature: float = 0.0,
    ) -> None:
        steps = max_tokens if window is None else min(window, max_tokens)
        if sigma < 0 or not math.isfinite(sigma):
            raise InputError(f"sigma is {sigma}; it must be 0 or greater")
        if lambda_ <= 0 or not math.isfinite(lambda_):
            raise InputError(f"lambda is {lambda_}; it must be greater than 0")
        if not 0.0 <= alpha <= 1.0:
            raise InputError(f"alpha is {alpha}; it must be in [0, 1]")
        if steps < 1:
            raise InputError(f"the control window is {steps} steps; it must be at least 1")
        self._sigma, self._lambda, self._alpha = sigma, lambda_, alpha
        self._seed, self._prompt_index = seed, prompt_index
        self._sampling = Sampling(temperature)
        self._u: FloatArray = np.zeros((steps, d), np.float32)
        self._v: FloatArray | None = None
        self._noise: FloatArray | None = None  # of the next iteration, where it was prepared
        self._iteration = 0

    @property
    def mean(self) -> FloatArray:
        """U [T, d], a copy."""
        return self._u.copy()

    def prepare(self, n: int) -> None:
        """Draw the noise of the next ``ask(n)``: most of its time."""
        self._noise = self._draw(n)

    def _draw(self, n: int) -> FloatArray:
        """``sigma * eps`` [n, T, d] of the next iteration."""
        seeds, (steps, d) = RowSeeds(self._seed, self._prompt_index, self._iteration + 1), self._u.shape
        return trajectories(seeds, n, steps, d, self._sigma)

    def ask(self, n: int) -> Controls:
        v, self._noise = self._noise, None
        if v is None or len(v) != n:
            v = self._draw(n)
        self._iteration += 1
        v += self._u
        self._v = v
        return Controls(n=n, vectors=v, sampling=self._sampling)

    def tell(self, rollouts: Rollouts, rewards: npt.NDArray[np.float64]) -> ControllerInfo:
        if self._v is None:
            raise InputError("tell() was called before ask()")
        v, self._v = self._v, None
        steps = len(self._u)
        used = np.array([min(len(tokens), steps) for tokens in rollouts.tokens])
        running = np.arange(steps) < used[:, None]  # [n, T]
        prior = None
        if self._alpha < 1.0 and self._sigma > 0.0:
            inner = np.einsum("td,ntd->nt", self._u, v, dtype=np.float64)
            squares = np.square(self._u, dtype=np.float64).sum(axis=1)
            ratio = (1.0 - self._alpha) * inner - 0.5 * (1.0 - self._alpha**2) * squares
            prior = (ratio * running).sum(axis=1) / self._sigma**2
        log_w = log_weights(rewards, self._lambda, prior=prior)
        by_step = normalise(np.where(running, log_w[:, None], -np.inf))  # [n, T]
        mean = np.zeros(self._u.shape)
        for weights, row in zip(by_step, v, strict=True):
            if weights.any():
                mean += weights[:, None] * row
        self._u = np.where(by_step.max(axis=0)[:, None] > 0, mean.astype(np.float32), self._u)
        return ControllerInfo(
            ess=effective_sample_size(normalise(log_w)),
            control_norm=length(self._u),
            lambda_=self._lambda,
        )
