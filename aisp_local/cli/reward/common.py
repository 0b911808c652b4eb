"""What the reward commands share."""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from aisp_local import shipped
from aisp_local.cli.generate import finite
from aisp_local.cli.output import print_answer


class _Folder(click.Path):
    """A path; or a shipped reward by its name, where nothing lies at a path of that name."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        return path if path.exists() else shipped.reward_by_name(str(path)) or path


PATH = click.Path(path_type=Path)
FOLDER = _Folder()


def print_json(value: Any, indent: int | None = 2) -> None:
    """A JSON document on standard output; None for what JSON has no number for."""
    print_answer(json.dumps(finite(value), ensure_ascii=False, indent=indent))


def one_line(text: str) -> str:
    """A text of somebody's manifest with "?" for what would move the cursor or change the terminal."""
    return "".join("?" if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in text)


def size_text(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"


def parameters_text(parameters: Mapping[str, int]) -> str:
    """As in "22.7 M int8, 0.3 M float32"; what is less than a hundredth of all goes unsaid."""
    total = sum(parameters.values())
    shown = [f"{n / 1e6:.3g} M {precision}" for precision, n in parameters.items() if n * 100 >= total]
    return ", ".join(shown) or "none found"
