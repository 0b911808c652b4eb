"""Plots of an evaluation as SVG text, without a plotting library."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from aisp_local.reward_kit.evaluate import Accuracy, Evaluation

_WIDTH, _HEIGHT, _MARGIN = 480, 360, 56
_POINTS = 2000  # drawn at most: a file stays small
_BLUE, _GREY = "#2b6cb0", "#888"


class _Axes:
    """A frame with two linear axes; methods take data coordinates."""

    def __init__(self, title: str, x: tuple[float, float, str], y: tuple[float, float, str]) -> None:
        self.x, self.y = _wide(x[:2]), _wide(y[:2])
        self.parts = [_text(_WIDTH / 2, 20, title, anchor="middle", size=14)]
        right, bottom = _WIDTH - 16, _HEIGHT - _MARGIN
        frame = f'x="{_MARGIN}" y="32" width="{right - _MARGIN}" height="{bottom - 32}"'
        self.parts.append(f'<rect {frame} fill="none" stroke="{_GREY}"/>')
        for i in range(6):
            value = self.x[0] + i / 5 * (self.x[1] - self.x[0])
            self.parts.append(_text(self.at(value, self.y[0])[0], bottom + 16, f"{value:.3g}", anchor="middle"))
            value = self.y[0] + i / 5 * (self.y[1] - self.y[0])
            self.parts.append(_text(_MARGIN - 6, self.at(self.x[0], value)[1] + 4, f"{value:.3g}", anchor="end"))
        self.parts.append(_text((_MARGIN + right) / 2, _HEIGHT - 14, x[2], anchor="middle"))
        middle = (32 + bottom) / 2
        self.parts.append(_text(14, middle, y[2], anchor="middle", more=f' transform="rotate(-90 14 {middle:g})"'))

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Pixels of a point."""
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return _MARGIN + across * (_WIDTH - 16 - _MARGIN), _HEIGHT - _MARGIN - up * (_HEIGHT - _MARGIN - 32)

    def line(self, a: tuple[float, float], b: tuple[float, float], colour: str, more: str = "") -> None:
        (x1, y1), (x2, y2) = self.at(*a), self.at(*b)
        self.parts.append(f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"{more}/>')

    def dot(self, x: float, y: float, radius: float, opacity: float = 1.0) -> None:
        at = self.at(x, y)
        self.parts.append(
            f'<circle cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="{radius:g}" fill="{_BLUE}" fill-opacity="{opacity:g}"/>'
        )

    def svg(self) -> str:
        return _document(_HEIGHT, self.parts)


def calibration(found: Evaluation) -> str:
    """Bradley-Terry probability against how often people agreed; a calibrated reward follows the diagonal."""
    axes = _Axes(
        f"{found.reward}: is it as sure as it should be?", (0.5, 1.0, "probability by the scores"), (0, 1, "observed")
    )
    axes.line((0.5, 0.5), (1, 1), _GREY, ' stroke-dasharray="4 4"')
    for part in found.calibration:
        axes.line((part.predicted, part.low), (part.predicted, part.high), _BLUE)
        axes.dot(part.predicted, part.observed, 4)
    return axes.svg()


def length(found: Evaluation) -> str:
    """Score against length, a dot a response; at most 2,000, evenly taken."""
    scores, lengths = found.scores.ravel(), found.lengths.ravel()
    rows = np.linspace(0, len(scores) - 1, min(_POINTS, len(scores))).astype(int)
    axes = _Axes(
        f"{found.reward}: score and length (Spearman {found.spearman:.2f})",
        (0, float(lengths.max()), "characters"),
        (float(scores.min()), float(scores.max()), "score"),
    )
    for i in rows:
        axes.dot(float(lengths[i]), float(scores[i]), 1.5, 0.4)
    return axes.svg()


def accuracy(found: Evaluation) -> str:
    """Accuracy with its interval, a line a group."""
    groups: Sequence[Accuracy] = [found.overall, *found.by_length, *found.by_source]
    left, right, top = 190, _WIDTH - 16, 44

    def across(share: float) -> float:
        return left + share * (right - left)

    bottom = top + 20 * len(groups)
    parts = [_text(_WIDTH / 2, 20, f"{found.reward}: share of pairs ranked as people did", anchor="middle", size=14)]
    for share in (0, 0.25, 0.5, 0.75, 1):
        x = across(share)
        parts.append(
            f'<line x1="{x:.1f}" y1="{top - 8}" x2="{x:.1f}" y2="{bottom}" stroke="{_GREY}" stroke-width="0.5"/>'
        )
        parts.append(_text(x, bottom + 16, f"{share:g}", anchor="middle"))
    for i, group in enumerate(groups):
        y = top + 20 * i + 4
        name = group.name if len(group.name) <= 24 else group.name[:23] + "…"
        parts.append(_text(left - 8, y + 4, f"{name} ({group.n})", anchor="end"))
        low, high = across(group.low), across(group.high)
        parts.append(f'<line x1="{low:.1f}" y1="{y}" x2="{high:.1f}" y2="{y}" stroke="{_BLUE}"/>')
        parts.append(f'<circle cx="{across(group.share):.1f}" cy="{y}" r="4" fill="{_BLUE}"/>')
    return _document(bottom + 28, parts)


PLOTS = {"accuracy.svg": accuracy, "calibration.svg": calibration, "length.svg": length}


def _wide(ends: tuple[float, float]) -> tuple[float, float]:
    """The ends of an axis, apart even where all values are one."""
    return ends if ends[1] > ends[0] else (ends[0] - 0.5, ends[0] + 0.5)


def _text(x: float, y: float, text: str, *, anchor: str, size: int = 11, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}"{more}>{escape(text)}</text>'


def _document(height: float, parts: Sequence[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:g}" font-family="sans-serif">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>"]) + "\n"
