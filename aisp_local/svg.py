"""Plots as SVG text, without a plotting library: what they are drawn with."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT, _TOP, RIGHT, _BOTTOM = 480, 360, 36, 16, 48
# Colours by class, so that a page in dark colours gets dark plots.
STYLE = """
  .paper { fill: #fff } text { fill: #1a1a1a } .data { stroke: #2b6cb0 } circle { fill: #2b6cb0 }
  circle.best { fill: #c05621 }
  polyline { fill: none; stroke-width: 2 }
  .series-0 { stroke: #2b6cb0 }  .series-1 { stroke: #c05621 }  .series-2 { stroke: #2f855a }
  .series-3 { stroke: #b83280 }  .series-4 { stroke: #6b46c1 }  .series-5 { stroke: #718096 }
  .series-6 { stroke: #b7791f }  .series-7 { stroke: #319795 }
  .frame { fill: none; stroke: #999 } .grid { stroke: #ddd } .chance { stroke: #777; stroke-dasharray: 4 4 }
  @media (prefers-color-scheme: dark) {
    .paper { fill: #1b1d21 } text { fill: #e4e6ea } .data { stroke: #7fb4ee } circle { fill: #7fb4ee }
    .series-0 { stroke: #7fb4ee } .series-1 { stroke: #f6ad55 } .series-2 { stroke: #68d391 }
    .series-3 { stroke: #f687b3 } .series-4 { stroke: #b794f4 } .series-5 { stroke: #a0aec0 }
    .series-6 { stroke: #ecc94b } .series-7 { stroke: #4fd1c5 }
    .frame { stroke: #777 } .grid { stroke: #3a3d44 } .chance { stroke: #999 } circle.best { fill: #f6ad55 }
  }
"""


class Axes:
    """A frame with two linear axes; methods take data coordinates. ``counts``: x has whole numbers only."""

    def __init__(
        self, title: str, x: tuple[float, float, str], y: tuple[float, float, str], *, counts: bool = False
    ) -> None:
        across, up = _ticks(*x[:2], least=1.0 if counts else 0.0), _ticks(*y[:2])
        self.x, self.y = (across[0], across[-1]), (up[0], up[-1])
        names = [_number(value, up) for value in up]
        self.left = 40 + max(text_width(name) for name in names)
        self.parts = [draw_title(title)]
        right, bottom = WIDTH - RIGHT, HEIGHT - _BOTTOM
        for value in across:
            self.line((value, self.y[0]), (value, self.y[1]), "grid")
            self.parts.append(draw_text(self.at(value, 0)[0], bottom + 16, _number(value, across), anchor="middle"))
        for value, name in zip(up, names, strict=True):
            self.line((self.x[0], value), (self.x[1], value), "grid")
            self.parts.append(draw_text(self.left - 6, self.at(0, value)[1] + 4, name, anchor="end"))
        size = f'width="{right - self.left:.1f}" height="{bottom - _TOP}"'
        self.parts.append(f'<rect class="frame" x="{self.left:.1f}" y="{_TOP}" {size}/>')
        self.parts.append(draw_text((self.left + right) / 2, HEIGHT - 12, x[2], anchor="middle"))
        middle = (_TOP + bottom) / 2
        self.parts.append(draw_text(16, middle, y[2], anchor="middle", more=f' transform="rotate(-90 16 {middle:g})"'))

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Pixels of a point."""
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        bottom = HEIGHT - _BOTTOM
        return self.left + across * (WIDTH - RIGHT - self.left), bottom - up * (bottom - _TOP)

    def line(self, a: tuple[float, float], b: tuple[float, float], kind: str) -> None:
        self.parts.append(draw_line(self.at(*a), self.at(*b), kind))

    def dot(self, x: float, y: float, radius: float, opacity: float = 1.0, *, best: bool = False) -> None:
        self.parts.append(draw_dot(self.at(x, y), radius, opacity, best=best))

    def curve(self, points: Sequence[tuple[float, float]], series: int) -> None:
        """A line through points; ``series`` names its colour, of eight."""
        places = " ".join(f"{x:.1f},{y:.1f}" for x, y in (self.at(*point) for point in points))
        self.parts.append(f'<polyline class="series-{series % 8}" points="{places}"/>')

    def legend(self, names: Sequence[str]) -> None:
        """Names of the series, in the lower right."""
        x = WIDTH - RIGHT - 30 - max(text_width(name) for name in names)
        for i, name in enumerate(names):
            y = HEIGHT - _BOTTOM - 14 * (len(names) - i)
            self.parts.append(f'<polyline class="series-{i % 8}" points="{x:.1f},{y - 4} {x + 16:.1f},{y - 4}"/>')
            self.parts.append(draw_text(x + 22, y, name, anchor="start"))

    def svg(self) -> str:
        return document(HEIGHT, self.parts)


def _ticks(low: float, high: float, least: float = 0.0) -> list[float]:
    """Four to eight round numbers around the values, also where these are all one; ``least`` is between two of them."""
    size = max(1.0, abs(low), abs(high))
    if not high - low > 1e-9 * size:
        low, high = low - 0.5 * size, high + 0.5 * size
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    factors = (1, 2, 5, 10) if least else (1, 2, 2.5, 5, 10)
    step = max(least, step * next(factor for factor in factors if (high - low) / (factor * step) <= 6))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _number(value: float, ticks: Sequence[float]) -> str:
    """As many decimals as tell the ticks of an axis apart, with a minus sign."""
    decimals = max(0, 1 - math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9))
    text = f"{value:,.{decimals}f}" if decimals < 7 else f"{value:.3g}"
    return (text.rstrip("0").rstrip(".") if "." in text else text).replace("-", "\N{MINUS SIGN}")


def text_width(text: str, size: int = 11) -> float:
    """About so many pixels, rather too many: what draws the plot has fonts of its own."""
    wide = sum(
        1.05 if unicodedata.east_asian_width(c) in "WF" or c in "WM@%" else 0.78 if c.isupper() else 0.62 for c in text
    )
    return size * wide


def shortened(text: str, width: float, size: int = 11) -> str:
    """The beginning and the end of a text that is too wide: names of data differ in both."""
    short = text
    for kept in range(len(text) - 1, 1, -1):
        if text_width(short, size) <= width:
            break
        short = f"{text[: (kept + 1) // 2]}…{text[len(text) - kept // 2 :]}"
    return short


def draw_title(text: str) -> str:
    return draw_text(WIDTH / 2, 22, text, anchor="middle", size=14)


def draw_line(a: tuple[float, float], b: tuple[float, float], kind: str) -> str:
    return f'<line class="{kind}" x1="{a[0]:.1f}" y1="{a[1]:.1f}" x2="{b[0]:.1f}" y2="{b[1]:.1f}"/>'


def draw_dot(at: tuple[float, float], radius: float, opacity: float = 1.0, *, best: bool = False) -> str:
    faint = (f' fill-opacity="{opacity:g}"' if opacity < 1 else "") + (' class="best"' if best else "")
    return f'<circle cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="{radius:g}"{faint}/>'


def draw_text(x: float, y: float, text: str, *, anchor: str, size: int = 11, more: str = "", whole: str = "") -> str:
    """``whole``: what is shown where the pointer rests."""
    inside = (f"<title>{_escape(whole)}</title>" if whole and whole != text else "") + _escape(text)
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}"{more}>{inside}</text>'


def _escape(text: str) -> str:
    """Without what no XML may hold."""
    return escape("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text))


def document(height: float, parts: Sequence[str]) -> str:
    size = f'width="{WIDTH}" height="{height:g}" viewBox="0 0 {WIDTH} {height:g}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="system-ui, sans-serif">'
    paper = '<rect class="paper" width="100%" height="100%"/>'
    return "\n".join([head, f"<style>{STYLE}</style>", paper, *parts, "</svg>"]) + "\n"


def heat_map(
    title: str,
    rows: tuple[str, Sequence[str]],
    columns: tuple[str, Sequence[str]],
    cells: Sequence[Sequence[float]],
    marked: Sequence[Sequence[bool]],
) -> str:
    """A cell for each value, the darker the higher, with the value in it; marked ones have a frame.

    ``rows`` and ``columns``: what they are, and their names.
    """
    finite = [value for row in cells for value in row if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    left, width = 96.0, (WIDTH - RIGHT - 96.0) / len(columns[1])
    height = (HEIGHT - _TOP - _BOTTOM) / len(rows[1])
    parts = [draw_title(title)]
    for i, (name, row) in enumerate(zip(rows[1], cells, strict=True)):
        y = _TOP + i * height
        parts.append(draw_text(left - 8, y + height / 2 + 4, name, anchor="end"))
        for j, value in enumerate(row):
            x = left + j * width
            share = (value - low) / (high - low) if high > low and math.isfinite(value) else 0.0
            frame = ' stroke="#c05621" stroke-width="3"' if marked[i][j] else ""
            size = f'x="{x + 2:.1f}" y="{y + 2:.1f}" width="{width - 4:.1f}" height="{height - 4:.1f}"'
            parts.append(f'<rect {size} fill="#2b6cb0" fill-opacity="{0.08 + 0.72 * share:.2f}"{frame}/>')
            parts.append(draw_text(x + width / 2, y + height / 2 + 4, f"{value:.3g}", anchor="middle"))
    for j, name in enumerate(columns[1]):
        parts.append(draw_text(left + (j + 0.5) * width, HEIGHT - _BOTTOM + 16, name, anchor="middle"))
    parts.append(draw_text(left + (WIDTH - RIGHT - left) / 2, HEIGHT - 12, columns[0], anchor="middle"))
    middle = (_TOP + HEIGHT - _BOTTOM) / 2
    parts.append(draw_text(16, middle, rows[0], anchor="middle", more=f' transform="rotate(-90 16 {middle:g})"'))
    return document(HEIGHT, parts)
