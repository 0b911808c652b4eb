"""How close an exported reward is to its model: in values, and in the order that it gives to responses."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from aisp_local.errors import ExportError
from aisp_local.reward_kit.export.quantise import Precision
from aisp_local.rewards.manifest import Parity

# Greatest difference, as a part of the spread of scores, and least share of pairs in the same order.
LIMITS: dict[Precision, tuple[float, float]] = {
    "fp32": (0.001, 0.99),
    "fp16": (0.02, 0.98),
    "int8": (0.15, 0.95),
    "int4": (0.75, 0.80),
}
Scores = npt.NDArray[np.float64]


def measure(precision: Precision, expected: Scores, found: Scores) -> Parity:
    """Parity of scores [n] with the model's [n]. Raises ExportError when the model scores all texts alike."""
    for name, scores in (("the model", expected), ("the exported reward", found)):
        if not np.isfinite(scores).all():
            raise ExportError(f"{name} gives scores that are not finite; nothing was written")
    spread = float(expected.std())
    if not spread > 1e-6 * max(1.0, float(np.abs(expected).max())):
        raise ExportError("the model gives every text the same score, so there is no reward in it; nothing was written")
    difference = np.abs(found - expected)
    upper = np.triu_indices(len(expected), 1)
    a, b = (np.sign(np.subtract.outer(scores, scores))[upper] for scores in (expected, found))
    return Parity(
        precision=precision,
        pairs=len(expected),
        max_abs=float(difference.max()),
        mean_abs=float(difference.mean()),
        spread=spread,
        kendall_tau=float(np.mean(a * b)),
        agreement=float(np.mean(a == b)),
    )


def check(parity: Parity, precision: Precision, tolerance: float | None) -> None:
    """Raises ExportError with the numbers when the parity is worse than its limits; ``tolerance`` is the first."""
    most, least = LIMITS[precision]
    most = most if tolerance is None else tolerance
    worst = parity.max_abs / parity.spread
    reasons = []
    if worst > most:
        reasons.append(f"scores differ by up to {worst:.2g} of their spread, and {most:g} is allowed (--tolerance)")
    if parity.agreement < least:
        reasons.append(f"{parity.agreement:.1%} of the pairs of texts are in the same order, and {least:.0%} must be")
    if reasons:
        raise ExportError(
            f"the {precision} export is too far from its model: {'; '.join(reasons)} ({sentence(parity)}); "
            "nothing was written: use a higher --precision"
        )


def sentence(parity: Parity) -> str:
    """The numbers for a person."""
    return (
        f"{parity.pairs} texts: difference at most {parity.max_abs:.2g}, mean {parity.mean_abs:.2g}, of a spread of "
        f"{parity.spread:.3g}; Kendall's tau {parity.kendall_tau:.3f}, "
        f"{parity.agreement:.1%} of pairs in the same order"
    )
