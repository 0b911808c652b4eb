"""Any Python function as a reward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from aisp_local.rewards.base import call
from aisp_local.types import Prompt


class CallableReward:
    """Scores with ``function(prompt, responses) -> scores``; checks what comes back."""

    def __init__(self, function: Callable[[Prompt, Sequence[str]], Any], name: str | None = None) -> None:
        self._function = function
        self.name = str(name or getattr(function, "__name__", type(function).__name__))

    def score(self, prompt: Prompt, responses: Sequence[str]) -> npt.NDArray[np.float32]:
        """Scores [n]. Raises ScoreError when the function raises, or gives anything but one number each."""
        with np.errstate(over="ignore"):  # beyond float32: infinite, and no candidate for the best
            return call(self.name, self._function, prompt, responses).astype(np.float32)
