"""How controls reach the pre-logits: inside the graph (patched build) or through a callback (stock build)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from aisp_local.types import FloatArray

ControlKind = Literal["auto", "graph", "callback"]
"""``auto``: the graph where the build can, else the callback."""

Ints = npt.NDArray[np.integer[Any]]


class Control(Protocol):
    """The controls of one context. ``d`` is the width of the pre-logits."""

    def prepare(self, params: Any) -> None:
        """Called with the context's parameters before it is made."""

    def attach(self, context: Any) -> None:
        """Called with the pointer of the context that was made."""

    def set(self, sequence: int, vectors: FloatArray, position: int, *, held: bool) -> None:
        """``vectors`` [T, d] for a sequence from ``position`` on, in the place of those that it has."""

    def unset(self, sequence: int) -> None:
        """No control for a sequence."""

    def clear(self) -> None:
        """No controls at all."""

    def want_prelogits(self, value: bool) -> None:
        """Whether ``prelogits`` will be asked for after the next decodes."""

    def before(self, sequences: Ints, positions: Ints, *, outputs: bool) -> None:
        """Called before each decode with what it holds."""

    def after(self, logits: Callable[[], FloatArray]) -> None:
        """Called after each decode that succeeded; ``logits()`` gives its logits [rows, V]."""

    def prelogits(self, rows: int) -> FloatArray:
        """Unperturbed pre-logits [rows, d] of the last decode's outputs; the next decode may overwrite them."""
