"""The seam between a search and what it wants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from aisp_local.types import Prompt


@runtime_checkable
class Reward(Protocol):
    """Scores responses to a prompt: higher is better."""

    @property
    def name(self) -> str:
        """What messages and results call it."""

    def score(self, prompt: Prompt, responses: Sequence[str]) -> npt.NDArray[np.float32]:
        """Scores [n] of n responses; ``prompt`` is plain text or messages, never a rendered template."""
