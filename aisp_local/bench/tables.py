"""Runs in turn, their ratios, and tables of what was found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Table:
    """Rows to print and to keep."""

    name: str
    title: str
    columns: Sequence[str]
    rows: list[list[Any]] = field(default_factory=list)

    def markdown(self) -> str:
        lines = [f"### {self.title}", "", "| " + " | ".join(self.columns) + " |", "|" + "---|" * len(self.columns)]
        lines += ["| " + " | ".join(map(_cell, row)) + " |" for row in self.rows]
        return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"
    return str(value)


def paired(runs: Sequence[Callable[[], float]], repeats: int) -> np.ndarray[Any, Any]:
    """Seconds [repeats, runs], in turn and in turned order, after one round that is not counted."""
    seconds = np.zeros((repeats + 1, len(runs)))
    for repeat in range(repeats + 1):
        order = range(len(runs)) if repeat % 2 else range(len(runs) - 1, -1, -1)
        for i in order:
            seconds[repeat, i] = runs[i]()
    return seconds[1:]


def ratio(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> list[float]:
    """Median and quartiles of the paired ratios a / b."""
    middle, low, high = np.quantile(a / b, [0.5, 0.25, 0.75])
    return [float(middle), float(low), float(high)]


def spread(values: Sequence[float]) -> str:
    return f"{values[0]:.3f} ({values[1]:.3f} to {values[2]:.3f})"
