"""Soft best-of-n: the answer is drawn from the samples with a probability that grows with the reward."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from aisp_local.controllers.best_of_n import BestOfN
from aisp_local.controllers.weights import importance_weights
from aisp_local.errors import InputError
from aisp_local.seeds import RowSeeds


class SoftBestOfN(BestOfN):
    """Samples as best-of-n does; the answer is one of them, drawn with ``softmax(r / lambda)``.

    Options: those of best-of-n and ``lambda_`` (reward units): towards 0 it is best-of-n, towards infinity one sample.
    """

    name = "soft-best-of-n"

    def __init__(
        self,
        *,
        d: int,
        max_tokens: int,
        seed: int,
        prompt_index: int = 0,
        lambda_: float = 0.3,
        temperature: float = 0.7,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
    ) -> None:
        super().__init__(
            d=d,
            max_tokens=max_tokens,
            seed=seed,
            prompt_index=prompt_index,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
        )
        if lambda_ <= 0 or not math.isfinite(lambda_):
            raise InputError(f"lambda is {lambda_}; it must be greater than 0")
        self._lambda, self._seeds = lambda_, RowSeeds(seed, prompt_index)

    def choose(self, rewards: npt.NDArray[np.float64]) -> int:
        """One uniform number decides, the same for the same seed and prompt, however many rollouts there are."""
        cumulative = importance_weights(rewards, self._lambda).cumsum()
        drawn = self._seeds.generator(0, "noise").random() * cumulative[-1]
        return int(np.searchsorted(cumulative, drawn, side="right"))
