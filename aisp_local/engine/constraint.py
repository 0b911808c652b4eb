"""A grammar beside a sampler.

The grammar comes after the cuts (top-k, top-p, min-p), as in llama.cpp: what is sampled from is the law that they
leave, of which the allowed tokens remain; only where it holds none, the law of the allowed tokens, cut in the same way.
Since a token drawn from the cut law and accepted if it is allowed is one of that law, the grammar is first asked about
the token that was drawn alone, and about others only where that is not allowed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from aisp_local.engine.sampling import kept, pick, shares, sparse_law
from aisp_local.errors import InputError
from aisp_local.native import Matcher
from aisp_local.types import FloatArray, Sampling

_TINY = np.float32(1e-30)

SparseLaw = tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], FloatArray, FloatArray]
"""As ``sampling.sparse_law`` gives it."""


class Constraint:
    """The grammar of one rollout, and where the rollout is in it. ``uniforms`` [T]: for tokens drawn a second time."""

    def __init__(self, matcher: Matcher, uniforms: npt.NDArray[np.float64]) -> None:
        self._matcher, self._uniforms = matcher, uniforms
        self._mask: npt.NDArray[np.bool_] | None = None  # of the whole vocabulary, if it was asked for here

    @property
    def complete(self) -> bool:
        """Whether the response may end here."""
        return self._matcher.complete

    def allowed(self, tokens: npt.NDArray[np.intp]) -> npt.NDArray[np.bool_]:
        """Which of the tokens [k] may come next."""
        return self._matcher.allowed(tokens)

    def masked(self, logits: FloatArray) -> FloatArray | None:
        """Logits [V] with -inf for what is not allowed; None if nothing that could be drawn is."""
        if self._mask is None:
            self._mask = self.allowed(np.arange(len(logits)))
        found = np.where(self._mask, logits, np.float32(-np.inf))
        return found if np.isfinite(found.max()) else None

    def law(self, logits: FloatArray, sampling: Sampling) -> FloatArray | None:
        """Logits [V] with -inf for what cannot be drawn, by the cuts or by the grammar; None if nothing can."""
        tokens = np.flatnonzero(kept(logits[None], sampling)[0])
        tokens = tokens[self.allowed(tokens)]
        if len(tokens):
            result = np.full(logits.shape, -np.inf, np.float32)
            result[tokens] = logits[tokens]
            return result
        masked = self.masked(logits)
        if masked is None:
            return None
        return np.where(kept(masked[None], sampling)[0], masked, np.float32(-np.inf))

    def choose(self, logits: FloatArray, sampling: Sampling, drawn: int, step: int) -> int | None:
        """The token that comes next, ``drawn`` if it may; None if none can."""
        if self._matcher.allows(drawn):
            return drawn
        law = self.law(logits, sampling)
        if law is None:
            return None
        return int(pick(law[None], Sampling(sampling.temperature), self._uniforms[step : step + 1])[0])

    def accept(self, token: int) -> None:
        """Go on with a token that ``choose`` gave or ``check`` let pass."""
        self._matcher.accept(token)
        self._mask = None

    def check(self, token: int) -> None:
        """Raises InputError if a token that is given may not come next."""
        if not self._matcher.allows(token):
            raise InputError("a response was to begin with tokens that its grammar does not allow")

    def follow(self, tokens: npt.NDArray[np.int32]) -> None:
        """Go on with tokens that are given. Raises InputError as ``check``."""
        for token in tokens.tolist():
            self.check(token)
            self.accept(token)

    def close(self) -> None:
        self._matcher.close()


def constrained_law(
    logits: FloatArray, constraints: Sequence[Constraint], sampling: Sampling, shift: FloatArray | None = None
) -> SparseLaw:
    """``sparse_law`` of rows [k, V] under their grammars: both laws are of the allowed tokens alone.

    Of a row on which nothing is allowed there are no entries.
    """
    k = len(logits)
    rows, tokens, p, base = sparse_law(logits, sampling, shift)
    starts = np.searchsorted(rows, np.arange(k + 1))
    parts: list[SparseLaw] = []
    for i, constraint in enumerate(constraints):
        mine = slice(starts[i], starts[i + 1])
        left = constraint.allowed(tokens[mine])
        row = rows[mine][left], tokens[mine][left], p[mine][left], base[mine][left]
        if not row[2].any():
            masked = constraint.masked(logits[i])
            if masked is None:
                continue
            row = sparse_law(masked[None], sampling, shift)
            row = row[0] + i, row[1], row[2], row[3]
        parts.append(row)
    if not parts:
        return rows[:0], tokens[:0], p[:0], base[:0]
    rows, tokens, p, base = (np.concatenate(column) for column in zip(*parts, strict=True))
    # What the base model alone could draw may be all that it has left: its law is never empty.
    return rows, tokens, shares(p, rows, k), shares(np.maximum(base, _TINY), rows, k)
