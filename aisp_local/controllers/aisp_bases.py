"""AISP between held and free: a few vectors that the steps share in turn, and noise of each step's own besides."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from aisp_local.controllers.base import ITERATIONS
from aisp_local.controllers.noise import antithetic
from aisp_local.controllers.weights import (
    effective_sample_size,
    importance_weights,
    lambda_for_ess,
    length,
)
from aisp_local.errors import InputError
from aisp_local.seeds import RowSeeds
from aisp_local.types import ControllerInfo, Controls, FloatArray, Rollouts, Sampling


class AispBases:
    """``v_t^i = sum_k B_k(t) (c_k +- sigma eps_k) + per_step sigma eta_t``; ``c <- sum_i w_i c^i`` (Eq. 14).

    B_k are ``bases`` hat functions over the steps, which add to 1: with one of them the vector is held, as in
    ``aisp-held``; with as many as there are steps each has its own, as in ``aisp``. What is learnt has ``bases`` d
    directions. The noise of each step explores what no shared vector reaches; its mean stays 0.
    Rows 2j and 2j + 1 have opposite eps (an odd last row stands alone); ``w = softmax(r / lambda)`` with a lambda that
    gives an effective sample size of ``ess_share * n``.
    Options: ``bases``, ``sigma``, ``per_step`` (in sigmas), ``ess_share``, ``temperature`` (0: greedy under the noise).
    """

    name = "aisp-bases"
    iterations = ITERATIONS

    def __init__(
        self,
        *,
        d: int,
        max_tokens: int,
        seed: int,
        prompt_index: int = 0,
        bases: int = 4,
        sigma: float = 0.7,
        per_step: float = 0.0,
        ess_share: float = 0.25,
        temperature: float = 0.0,
    ) -> None:
        if bases < 1:
            raise InputError(f"bases is {bases}; it must be at least 1")
        if sigma < 0 or not math.isfinite(sigma):
            raise InputError(f"sigma is {sigma}; it must be 0 or greater")
        if per_step < 0 or not math.isfinite(per_step):
            raise InputError(f"per_step is {per_step}; it must be 0 or greater")
        if not 0.0 < ess_share <= 1.0:
            raise InputError(f"ess_share is {ess_share}; it must be in (0, 1]")
        self._sigma, self._per_step, self._ess_share = sigma, per_step * sigma, ess_share
        self._seed, self._prompt_index = seed, prompt_index
        self._sampling = Sampling(temperature)
        self._hats = hats(min(bases, max_tokens), max_tokens)
        self._c: FloatArray = np.zeros((len(self._hats), d), np.float32)
        self._tried: FloatArray | None = None  # c^i [n, K, d]
        self._iteration = 0

    @property
    def mean(self) -> FloatArray:
        """``sum_k B_k(t) c_k`` [T, d]."""
        return self._hats.T @ self._c

    def ask(self, n: int) -> Controls:
        self._iteration += 1
        seeds = RowSeeds(self._seed, self._prompt_index, self._iteration)
        (k, d), steps = self._c.shape, self._hats.shape[1]
        tried = self._c + np.float32(self._sigma) * antithetic(seeds, n, k * d).reshape(n, k, d)
        v = np.einsum("kt,nkd->ntd", self._hats, tried)
        if self._per_step:
            for row in range(n):
                generator = seeds.generator(row, "noise")
                generator.standard_normal((k, d), dtype=np.float32)  # those of eps
                v[row] += np.float32(self._per_step) * generator.standard_normal((steps, d), dtype=np.float32)
        self._tried = tried
        held = len(self._hats) == 1 and not self._per_step
        return Controls(n=n, vectors=v[:, :1] if held else v, held=held, sampling=self._sampling)

    def tell(self, rollouts: Rollouts, rewards: npt.NDArray[np.float64]) -> ControllerInfo:
        if self._tried is None:
            raise InputError("tell() was called before ask()")
        tried, self._tried = self._tried, None
        lambda_ = lambda_for_ess(rewards, self._ess_share * len(rewards))
        ess = None
        if lambda_ is not None:
            weights = importance_weights(rewards, lambda_)
            ess = effective_sample_size(weights)
            self._c = np.einsum("n,nkd->kd", weights, tried, dtype=np.float64).astype(np.float32)
        return ControllerInfo(ess=ess, control_norm=length(self._c), lambda_=lambda_)


def hats(bases: int, steps: int) -> FloatArray:
    """[K, T]: piecewise linear, 1 at their own of K evenly spaced steps, 0 at the others'; they add to 1 everywhere."""
    at, knots = np.arange(steps), np.linspace(0.0, steps - 1.0, bases)
    if bases == 1:
        return np.ones((1, steps), np.float32)
    return np.stack([np.interp(at, knots, one) for one in np.eye(bases)]).astype(np.float32)
