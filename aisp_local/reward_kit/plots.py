"""Plots of an evaluation as SVG text, without a plotting library."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from aisp_local.reward_kit.evaluate import Accuracy, Evaluation
from aisp_local.svg import (
    RIGHT,
    WIDTH,
    Axes,
    document,
    draw_dot,
    draw_line,
    draw_text,
    draw_title,
    shortened,
    text_width,
)

_LABELS = (60, 250)  # least and greatest width of the names of groups
_POINTS = 2000  # drawn at most: a file stays small


def calibration(found: Evaluation) -> str:
    """Bradley-Terry probability against how often people agreed; a calibrated reward follows the diagonal."""
    axes = Axes(
        f"{_name(found)}: is it as sure as it should be?",
        (0.5, 1.0, "how sure it is of its preference (probability by the scores)"),
        (0, 1, "share of pairs where people agreed"),
    )
    axes.line((0.5, 0.5), (1, 1), "chance")
    for part in found.calibration:
        axes.line((part.predicted, part.low), (part.predicted, part.high), "data")
        axes.dot(part.predicted, part.observed, 4)
    return axes.svg()


def length(found: Evaluation) -> str:
    """Score against length, a dot a response; at most 2,000, evenly taken."""
    scores, lengths = found.scores.ravel(), found.lengths.ravel()
    rows = np.linspace(0, len(scores) - 1, min(_POINTS, len(scores))).astype(int)
    axes = Axes(
        f"{_name(found)}: score and length (Spearman {found.spearman:.2f})",
        (0, float(lengths.max()), "characters of the response"),
        (float(scores.min()), float(scores.max()), "score"),
    )
    for i in rows:
        axes.dot(float(lengths[i]), float(scores[i]), 1.5, 0.4)
    return axes.svg()


def accuracy(found: Evaluation) -> str:
    """Accuracy with its interval, a line a group; a gap between all, the lengths and the sources."""
    blocks: list[Sequence[Accuracy]] = [b for b in ([found.overall], found.by_length, found.by_source) if b]
    names = {group.name: shortened(group.name, _LABELS[1] - text_width(f" ({group.n})")) for b in blocks for group in b}
    widths = [text_width(f"{names[group.name]} ({group.n})") for block in blocks for group in block]
    left, right, top = 16 + max(_LABELS[0], *widths), WIDTH - RIGHT, 52
    bottom = top + 20 * len(widths) + 10 * (len(blocks) - 1)

    def across(share: float) -> float:
        return left + share * (right - left)

    parts = [draw_title(f"{_name(found)}: share of pairs ranked as people did")]
    for share in (0, 0.25, 0.5, 0.75, 1):
        kind = "chance" if share == 0.5 else "grid"
        parts.append(draw_line((across(share), top - 10), (across(share), bottom - 6), kind))
        parts.append(draw_text(across(share), bottom + 12, f"{share:g}", anchor="middle"))
    y = top
    for block in blocks:
        for group in block:
            label = f"{names[group.name]} ({group.n})"
            parts.append(draw_text(left - 10, y + 4, label, anchor="end", whole=f"{group.name} ({group.n})"))
            parts.append(draw_line((across(group.low), y), (across(group.high), y), "data"))
            parts.append(draw_dot((across(group.share), y), 4))
            y += 20
        y += 10
    return document(bottom + 24, parts)


PLOTS = {"accuracy.svg": accuracy, "calibration.svg": calibration, "length.svg": length}


def _name(found: Evaluation) -> str:
    return shortened(found.reward, 200, 14)
