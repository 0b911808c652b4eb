"""Random numbers that depend on what they are for, never on when they are drawn.

Each stream is ``numpy.random.Generator(Philox(SeedSequence([seed, prompt_index, iteration, row, stream])))``
with ``iteration`` from 1, ``row`` from 0 and stream 0 for control noise, 1 for token sampling. Control
noise of a row is ``standard_normal((T, d), dtype=float32)`` (held: ``(1, d)``); token sampling is
``random(max_tokens)``, one float64 a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from aisp_local.errors import InputError

Stream = Literal["noise", "sampling", "grammar"]
_STREAMS: dict[Stream, int] = {"noise": 0, "sampling": 1, "grammar": 2}


@dataclass(frozen=True)
class RowSeeds:
    """Names the random numbers of one iteration's rows."""

    seed: int
    prompt_index: int = 0
    iteration: int = 1

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise InputError(f"the seed is {self.seed}; it must be 0 or greater")
        if self.prompt_index < 0:
            raise InputError(f"the prompt index is {self.prompt_index}; it must be 0 or greater")

    def generator(self, row: int, stream: Stream) -> np.random.Generator:
        """A fresh generator for one row (from 0) and purpose."""
        key = [self.seed, self.prompt_index, self.iteration, row, _STREAMS[stream]]
        return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
