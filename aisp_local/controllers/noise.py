"""Gaussian control noise, each row from its own seed."""

from __future__ import annotations

import numpy as np

from aisp_local.seeds import RowSeeds
from aisp_local.types import FloatArray


def trajectories(seeds: RowSeeds, n: int, steps: int, d: int, sigma: float) -> FloatArray:
    """``sigma * eps`` [n, T, d], independent at every step."""
    noise = np.empty((n, steps, d), np.float32)
    for row in range(n):
        seeds.generator(row, "noise").standard_normal(dtype=np.float32, out=noise[row])
    noise *= np.float32(sigma)
    return noise


def antithetic(seeds: RowSeeds, n: int, d: int) -> FloatArray:
    """``eps`` [n, d] in pairs: row 2j + 1 is the negative of row 2j; an odd last row stands alone."""
    noise = np.empty((n, d), np.float32)
    for row in range(0, n, 2):
        noise[row] = seeds.generator(row, "noise").standard_normal((1, d), dtype=np.float32)[0]
        if row + 1 < n:
            noise[row + 1] = -noise[row]
    return noise
