"""Standard output, whatever its encoding and its state."""

from __future__ import annotations

import json
import os
import re
import sys
import unicodedata
from typing import Any

import click

from aisp_local.errors import InputError
from aisp_local.finite import finite

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def print_answer(text: str) -> None:
    """``print_text`` and the end of the line."""
    print_text(text + "\n")


def print_text(text: str) -> None:
    """Print to standard output, with "?" for what its encoding lacks, lone surrogates among it.

    What would move the cursor of a terminal, or command it, is a "?" there too: a model may write anything.
    Raises InputError when it is full; a closed pipe is click's to handle.
    """
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    if sys.stdout is not None and sys.stdout.isatty():
        text = tame(text)
    try:
        # As it is: else click takes what looks like a colour out of what goes to a file or a program.
        click.echo(text.encode(encoding, "replace").decode(encoding), nl=False, color=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python fails again when it exits
        raise InputError(f"standard output cannot be written ({error.strerror}); write to another place") from error


def print_json(value: Any, indent: int | None = 2) -> None:
    """A JSON document on standard output; None for what JSON has no number for."""
    print_answer(json.dumps(finite(value), ensure_ascii=False, indent=indent))


def tame(text: str) -> str:
    """A text with "?" for control characters, but ends of lines and tabs."""
    return _CONTROL.sub("?", text)


def one_line(text: str) -> str:
    """A text of somebody's manifest with "?" for what would move the cursor or change the terminal."""
    return "".join("?" if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in text)


def size_text(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    """As in "42 s", "3 min 05 s", "1 h 20 min"."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def dim(text: str) -> str:
    """For what is said beside an answer."""
    return click.style(text, dim=True)
