"""MISVO: minimally invasive steering of sampled decoding, as its authors describe it.

A control for each step follows the score function of the reward and is pulled back by the Fisher matrix:

    g_t = mean_i (R_i - mean of the others) W^T (e_{y_t} - p_t)
    u_t <- u_t + eta (g_t - lambda F_t u_t),    F_t u = W^T (p * v - p (p . v)),  v = W u,

p in F_t being the mean law of step t over the first iteration's rollouts, which are the base model's.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from aisp_local.controllers.base import ITERATIONS
from aisp_local.controllers.weights import length
from aisp_local.errors import InputError
from aisp_local.types import ControllerInfo, Controls, FloatArray, Head, Rollouts, Sampling


class Misvo:
    """Options: ``eta`` (step), ``lambda_`` (pull), ``temperature`` of sampling, ``window`` (control steps T)."""

    name = "misvo"
    iterations = ITERATIONS

    def __init__(
        self,
        *,
        d: int,
        max_tokens: int,
        seed: int,
        head: Head | None = None,
        prompt_index: int = 0,
        eta: float = 0.1,
        lambda_: float = 1.0,
        temperature: float = 0.7,
        window: int | None = None,
    ) -> None:
        if not eta > 0 or not math.isfinite(eta):
            raise InputError(f"eta is {eta}; it must be greater than 0")
        if lambda_ < 0 or not math.isfinite(lambda_):
            raise InputError(f"lambda is {lambda_}; it must be 0 or greater")
        if not temperature > 0:
            raise InputError(f"temperature is {temperature}; misvo samples, so it must be greater than 0")
        steps = max_tokens if window is None else min(window, max_tokens)
        if steps < 1:
            raise InputError(f"the control window is {steps} steps; it must be at least 1")
        self._eta, self._lambda = eta, lambda_
        self._head, self._sampling = head, Sampling(temperature)
        self._u: FloatArray = np.zeros((steps, d), np.float32)
        self._laws: FloatArray | None = None  # [T, V], mean over the first iteration's rollouts
        self._iteration = 0

    @property
    def mean(self) -> FloatArray:
        """U [T, d], a copy."""
        return self._u.copy()

    def ask(self, n: int) -> Controls:
        self._iteration += 1
        v = None if self._iteration == 1 else np.broadcast_to(self._u, (n, *self._u.shape)).copy()
        return Controls(n=n, vectors=v, sampling=self._sampling, want=frozenset({"prelogits"}))

    def tell(self, rollouts: Rollouts, rewards: npt.NDArray[np.float64]) -> ControllerInfo:
        finite = np.flatnonzero(np.isfinite(rewards)).tolist()
        if self._head is None or rollouts.prelogits is None or len(finite) < 2:
            return ControllerInfo(control_norm=length(self._u))
        others = (rewards[finite].sum() - rewards[finite]) / (len(finite) - 1)
        advantages = (rewards[finite] - others) / len(finite)
        steps = len(self._u)
        tokens = [rollouts.tokens[i][:steps] for i in finite]
        z = np.concatenate([rollouts.prelogits[i][:steps] for i in finite])
        step = np.concatenate([np.arange(len(row)) for row in tokens])
        if self._laws is None:
            self._laws = self._mean_laws(self._head, z, step)
        weight = np.repeat(advantages, [len(row) for row in tokens])
        scores = self._head.score(z + self._u[step], np.concatenate(tokens), self._sampling.temperature)
        gradient = np.zeros_like(self._u)
        np.add.at(gradient, step, scores * weight[:, None].astype(np.float32))
        pull = self._head.fisher(self._u, self._laws, self._sampling.temperature)
        self._u += np.float32(self._eta) * (gradient - np.float32(self._lambda) * pull)
        return ControllerInfo(control_norm=length(self._u))

    def _mean_laws(self, head: Head, z: FloatArray, step: npt.NDArray[np.int64]) -> FloatArray:
        """[T, V]; zero at steps that no rollout reached, which then have no pull."""
        rows = [head.law(z[step == t], self._sampling.temperature).mean(axis=0) for t in range(int(step.max()) + 1)]
        laws = np.zeros((len(self._u), len(rows[0])), np.float32)
        laws[: len(rows)] = rows
        return laws
