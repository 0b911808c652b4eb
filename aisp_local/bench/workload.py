"""What the measurements decode."""

from __future__ import annotations

from typing import Any

import numpy as np

from aisp_local.engine import LlamaEngine
from aisp_local.types import Sampling

WARM = Sampling(0.8, top_p=0.9)
SIGMA = 0.3
_TEXT = "Once upon a time, in a big forest, there lived a fox who wanted to see the sea. " * 20


def prompt_of(engine: LlamaEngine, tokens: int) -> str:
    """A prompt of about so many tokens."""
    text = _TEXT * (1 + tokens // 200)
    low, high = 1, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(engine.tokens(text[:middle])) <= tokens else (low, middle - 1)
    return text[:low].rstrip()


def noise(engine: LlamaEngine, n: int, steps: int, held: bool = False) -> np.ndarray[Any, Any]:
    shape = (n, 1 if held else steps, engine.d)
    return np.float32(SIGMA) * np.random.default_rng(0).standard_normal(shape, np.float32)
