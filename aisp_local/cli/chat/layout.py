"""Text in the width of the terminal: wrapped, in columns, or a line each."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Sequence
from itertools import zip_longest

from aisp_local.cli.output import tame

_WIDEST = 100
_NARROWEST = 28
_GAP = "  │  "


def wrapped(text: str) -> str:
    """The text with its long lines broken between words, where a terminal shows it."""
    if not sys.stdout.isatty():
        return text
    text = tame(text)
    width = min(shutil.get_terminal_size().columns, _WIDEST)
    breaker = textwrap.TextWrapper(width, break_long_words=False, break_on_hyphens=False)
    return "\n".join(breaker.fill(line) if len(line) > width else line for line in text.split("\n"))


def columns(texts: Sequence[str]) -> str:
    """Texts side by side, each in its share of the terminal's width; below each other where that is too little."""
    total = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    width = min(_WIDEST, (total - len(_GAP) * (len(texts) - 1)) // max(1, len(texts)))
    if width < _NARROWEST:
        return "\n\n".join(wrapped(text) for text in texts)
    cells = [_filled(tame(text), width) for text in texts]
    rows = zip_longest(*cells, fillvalue="")
    return "\n".join(_GAP.join(line + " " * (width - _cells(line)) for line in row).rstrip() for row in rows)


def told_apart(texts: Sequence[str], width: int = 90) -> list[str]:
    """Each text on one line of at most so many characters, from where it is unlike all others if that is far in."""
    lines = [tame(" ".join(text.split())) for text in texts]
    shown = []
    for line in lines:
        common = max((len(os.path.commonprefix([line, other])) for other in lines if other != line), default=0)
        begin = line.rfind(" ", 0, common) + 1 if common > width // 2 else 0
        shown.append(("..." if begin else "") + line[begin:])
    return [line if len(line) <= width else line[: width - 3] + "..." for line in shown]


def columns_left(used: int, least: int = 30) -> int:
    """Columns of the terminal, up to its widest, beside so many; for what is no terminal its widest."""
    total = min(shutil.get_terminal_size().columns, _WIDEST) if sys.stdout.isatty() else _WIDEST
    return max(least, total - used)


def _filled(text: str, width: int) -> list[str]:
    """Lines of at most so many cells, broken between words, and within those that are longer."""
    lines = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split(" "):
            longer = f"{line} {word}" if line else word
            if _cells(longer) <= width:
                line = longer
                continue
            if line:
                lines.append(line)
            line = ""
            for character in word:
                if _cells(line + character) > width:
                    lines.append(line)
                    line = ""
                line += character
        lines.append(line)
    return lines


def _cells(text: str) -> int:
    """Cells of a terminal that the text takes: two for a wide character, none for one that joins another."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
