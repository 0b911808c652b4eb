"""Plots of an evaluation as SVG text, without a plotting library."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from html import escape

import numpy as np

from aisp_local.reward_kit.evaluate import Accuracy, Evaluation

_WIDTH, _HEIGHT, _TOP, _RIGHT, _BOTTOM = 480, 360, 36, 16, 48
_LABELS = (60, 250)  # least and greatest width of the names of groups
_POINTS = 2000  # drawn at most: a file stays small
# Colours by class, so that a page in dark colours gets dark plots.
_STYLE = """<style>
  .paper { fill: #fff } text { fill: #1a1a1a } .data { stroke: #2b6cb0 } circle { fill: #2b6cb0 }
  .frame { fill: none; stroke: #999 } .grid { stroke: #ddd } .chance { stroke: #777; stroke-dasharray: 4 4 }
  @media (prefers-color-scheme: dark) {
    .paper { fill: #1b1d21 } text { fill: #e4e6ea } .data { stroke: #7fb4ee } circle { fill: #7fb4ee }
    .frame { stroke: #777 } .grid { stroke: #3a3d44 } .chance { stroke: #999 }
  }
</style>"""


class _Axes:
    """A frame with two linear axes; methods take data coordinates."""

    def __init__(self, title: str, x: tuple[float, float, str], y: tuple[float, float, str]) -> None:
        across, up = _ticks(*x[:2]), _ticks(*y[:2])
        self.x, self.y = (across[0], across[-1]), (up[0], up[-1])
        names = [_number(value, up) for value in up]
        self.left = 40 + max(_text_width(name) for name in names)
        self.parts = [_title(title)]
        right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
        for value in across:
            self.line((value, self.y[0]), (value, self.y[1]), "grid")
            self.parts.append(_text(self.at(value, 0)[0], bottom + 16, _number(value, across), anchor="middle"))
        for value, name in zip(up, names, strict=True):
            self.line((self.x[0], value), (self.x[1], value), "grid")
            self.parts.append(_text(self.left - 6, self.at(0, value)[1] + 4, name, anchor="end"))
        size = f'width="{right - self.left:.1f}" height="{bottom - _TOP}"'
        self.parts.append(f'<rect class="frame" x="{self.left:.1f}" y="{_TOP}" {size}/>')
        self.parts.append(_text((self.left + right) / 2, _HEIGHT - 12, x[2], anchor="middle"))
        middle = (_TOP + bottom) / 2
        self.parts.append(_text(16, middle, y[2], anchor="middle", more=f' transform="rotate(-90 16 {middle:g})"'))

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Pixels of a point."""
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        bottom = _HEIGHT - _BOTTOM
        return self.left + across * (_WIDTH - _RIGHT - self.left), bottom - up * (bottom - _TOP)

    def line(self, a: tuple[float, float], b: tuple[float, float], kind: str) -> None:
        self.parts.append(_line(self.at(*a), self.at(*b), kind))

    def dot(self, x: float, y: float, radius: float, opacity: float = 1.0) -> None:
        self.parts.append(_dot(self.at(x, y), radius, opacity))

    def svg(self) -> str:
        return _document(_HEIGHT, self.parts)


def calibration(found: Evaluation) -> str:
    """Bradley-Terry probability against how often people agreed; a calibrated reward follows the diagonal."""
    axes = _Axes(
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
    axes = _Axes(
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
    names = {group.name: _short(group.name, _LABELS[1] - _text_width(f" ({group.n})")) for b in blocks for group in b}
    widths = [_text_width(f"{names[group.name]} ({group.n})") for block in blocks for group in block]
    left, right, top = 16 + max(_LABELS[0], *widths), _WIDTH - _RIGHT, 52
    bottom = top + 20 * len(widths) + 10 * (len(blocks) - 1)

    def across(share: float) -> float:
        return left + share * (right - left)

    parts = [_title(f"{_name(found)}: share of pairs ranked as people did")]
    for share in (0, 0.25, 0.5, 0.75, 1):
        kind = "chance" if share == 0.5 else "grid"
        parts.append(_line((across(share), top - 10), (across(share), bottom - 6), kind))
        parts.append(_text(across(share), bottom + 12, f"{share:g}", anchor="middle"))
    y = top
    for block in blocks:
        for group in block:
            label = f"{names[group.name]} ({group.n})"
            parts.append(_text(left - 10, y + 4, label, anchor="end", whole=f"{group.name} ({group.n})"))
            parts.append(_line((across(group.low), y), (across(group.high), y), "data"))
            parts.append(_dot((across(group.share), y), 4))
            y += 20
        y += 10
    return _document(bottom + 24, parts)


PLOTS = {"accuracy.svg": accuracy, "calibration.svg": calibration, "length.svg": length}


def _ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers around the values, also where these are all one."""
    if not high > low:
        low, high = low - 0.5, high + 0.5
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10) if (high - low) / (factor * step) <= 6)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _number(value: float, ticks: Sequence[float]) -> str:
    """As many decimals as tell the ticks of an axis apart, with a minus sign."""
    decimals = max(0, 1 - math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9))
    text = f"{value:,.{decimals}f}" if decimals < 7 else f"{value:.3g}"
    return (text.rstrip("0").rstrip(".") if "." in text else text).replace("-", "\N{MINUS SIGN}")


def _text_width(text: str, size: int = 11) -> float:
    """About so many pixels, rather too many: what draws the plot has fonts of its own."""
    wide = sum(
        1.05 if unicodedata.east_asian_width(c) in "WF" or c in "WM@%" else 0.78 if c.isupper() else 0.62 for c in text
    )
    return size * wide


def _short(text: str, width: float, size: int = 11) -> str:
    """The beginning and the end of a text that is too wide: names of data differ in both."""
    short = text
    for kept in range(len(text) - 1, 1, -1):
        if _text_width(short, size) <= width:
            break
        short = f"{text[: (kept + 1) // 2]}…{text[len(text) - kept // 2 :]}"
    return short


def _name(found: Evaluation) -> str:
    return _short(found.reward, 200, 14)


def _title(text: str) -> str:
    return _text(_WIDTH / 2, 22, text, anchor="middle", size=14)


def _line(a: tuple[float, float], b: tuple[float, float], kind: str) -> str:
    return f'<line class="{kind}" x1="{a[0]:.1f}" y1="{a[1]:.1f}" x2="{b[0]:.1f}" y2="{b[1]:.1f}"/>'


def _dot(at: tuple[float, float], radius: float, opacity: float = 1.0) -> str:
    faint = f' fill-opacity="{opacity:g}"' if opacity < 1 else ""
    return f'<circle cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="{radius:g}"{faint}/>'


def _text(x: float, y: float, text: str, *, anchor: str, size: int = 11, more: str = "", whole: str = "") -> str:
    """``whole``: what is shown where the pointer rests."""
    inside = (f"<title>{_escape(whole)}</title>" if whole and whole != text else "") + _escape(text)
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}"{more}>{inside}</text>'


def _escape(text: str) -> str:
    """Without what no XML may hold."""
    return escape("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text))


def _document(height: float, parts: Sequence[str]) -> str:
    size = f'width="{_WIDTH}" height="{height:g}" viewBox="0 0 {_WIDTH} {height:g}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="system-ui, sans-serif">'
    return "\n".join([head, _STYLE, '<rect class="paper" width="100%" height="100%"/>', *parts, "</svg>"]) + "\n"
