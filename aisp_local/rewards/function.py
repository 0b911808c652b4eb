"""Any Python function as a reward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from aisp_local.errors import ScoreError
from aisp_local.rewards.base import check_count
from aisp_local.types import Prompt


class CallableReward:
    """Scores with ``function(prompt, responses) -> scores``; checks what comes back."""

    def __init__(self, function: Callable[[Prompt, Sequence[str]], Any], name: str | None = None) -> None:
        self._function = function
        self.name = str(name or getattr(function, "__name__", type(function).__name__))

    def score(self, prompt: Prompt, responses: Sequence[str]) -> npt.NDArray[np.float32]:
        result = self._function(prompt, list(responses))
        try:
            scores = np.asarray(result, dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise ScoreError(f"the reward {self.name!r} gave something that is not numbers: {error}") from error
        check_count(self.name, scores, len(responses))
        return scores
