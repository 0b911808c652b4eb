"""Curves of a contest: the best reward so far by the number of rollouts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from aisp_local.bench.contest import Run
from aisp_local.svg import Axes


def curves(pair: str, played: Mapping[str, Sequence[Run]]) -> str:
    """An SVG with one curve a method, means over prompts; rollouts on a logarithmic axis."""
    so_far = {
        label: np.mean([np.maximum.accumulate(run.rewards) for run in runs], axis=0) for label, runs in played.items()
    }
    most = max(len(values) for values in so_far.values())
    first = min(4, most)
    shown = np.concatenate([values[first - 1 :] for values in so_far.values()])
    axes = Axes(
        f"{pair}: best reward so far",
        (math.log2(first), math.log2(most), "log2 of the rollouts"),
        (float(shown.min()), float(shown.max()), "mean over the prompts"),
    )
    for i, values in enumerate(so_far.values()):
        at = sorted({round(2 ** (step / 8)) for step in range(8 * 20)} & set(range(first, len(values) + 1)))
        axes.curve([(math.log2(n), float(values[n - 1])) for n in at], i)
    axes.legend(list(so_far))
    return axes.svg()
