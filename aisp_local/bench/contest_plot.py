"""Curves of a contest: the best reward so far by the number of rollouts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from aisp_local.bench.contest import Run, best_so_far
from aisp_local.svg import Axes

_MOST = 8  # colours
_FIRST = ("score", "best-of-n", "aisp", "aisp-static", "misvo", "smc", "aisp-held", "cem")
"""What is drawn where there is more than that: the default, what it is held against, and the nearest others."""


def curves(pair: str, played: Mapping[str, Sequence[Run]]) -> str:
    """An SVG with one curve a method, means over prompts; rollouts on a logarithmic axis.

    Points are where iterations have ended, of which each rollout may owe its reward to all others. At most
    eight are drawn, no variants of a method, and none whose answer is not the best of its rollouts.
    """
    there = [label for label, runs in played.items() if ", " not in label and not runs[0].chosen]
    drawn = sorted(there, key=lambda label: _FIRST.index(label) if label in _FIRST else len(_FIRST))[:_MOST]
    so_far = {label: np.mean([best_so_far(run) for run in played[label]], axis=0) for label in drawn}
    most = max(len(values) for values in so_far.values())
    begins = {label: min(played[label][0].n, len(values)) for label, values in so_far.items()}
    first = min(begins.values())
    shown = np.concatenate([values[begins[label] - 1 :] for label, values in so_far.items()])
    shown = shown[np.isfinite(shown)] if np.isfinite(shown).any() else np.zeros(1)
    room = 0.09 * len(so_far) * float(np.ptp(shown))  # below the curves, for their names
    axes = Axes(
        f"{pair}: best reward so far",
        (math.log2(first), math.log2(most), "log2 of the rollouts"),
        (float(shown.min()) - room, float(shown.max()), "mean over the prompts"),
    )
    for i, (label, values) in enumerate(so_far.items()):
        at = range(begins[label], len(values) + 1, begins[label])
        axes.curve([(math.log2(n), float(values[n - 1])) for n in at if np.isfinite(values[n - 1])], i)
    axes.legend(list(so_far))
    return axes.svg()
