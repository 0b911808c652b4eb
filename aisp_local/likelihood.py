"""How likely the base model finds the tokens of an answer, place by place."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from aisp_local.engine import Engine
from aisp_local.errors import InputError
from aisp_local.seeds import RowSeeds
from aisp_local.types import Candidate, Controls, FloatArray, Prompt, Step, TokenLogprob


def token_logprobs(engine: Engine, prompt: Prompt, candidate: Candidate, top: int = 0) -> list[TokenLogprob]:
    """Of each token of a candidate's text, in nats, with those of the ``top`` likeliest tokens at its place.

    The base model's at temperature 1, without control, grammar or cuts. One more decode step a token. Raises InputError
    for a candidate without tokens, as no search gives it.
    """
    tokens = _spoken(engine, candidate)
    if not len(tokens):
        if candidate.text:
            raise InputError("the candidate has no tokens; take one of a result")
        return []
    reader = _Reader(engine, tokens, top)
    controls = Controls(n=1, prefixes=[tokens], processor=reader)
    # What reports its steps is given its tokens one by one; the last one is drawn, and no matter.
    engine.rollout(prompt, controls, max_tokens=len(tokens), seeds=RowSeeds(0), want=frozenset({"logprobs"}))
    return reader.found


def _spoken(engine: Engine, candidate: Candidate) -> npt.NDArray[np.int32]:
    """Its tokens that begin within its text: without the one that ended it, and what a stop string took away."""
    size, length = len(candidate.text.encode()), 0
    for i, token in enumerate(candidate.tokens):
        if length >= size:
            return candidate.tokens[:i]
        length += len(engine.piece(int(token)))
    return candidate.tokens


class _Reader:
    """A logits processor that changes nothing and remembers."""

    needs_prelogits = False

    def __init__(self, engine: Engine, tokens: npt.NDArray[np.int32], top: int) -> None:
        self._engine, self._tokens, self._top = engine, tokens, top
        self.found: list[TokenLogprob] = []

    def __call__(self, step: Step) -> FloatArray:
        row = step.logits[0].astype(np.float64)
        row -= row.max()
        row -= np.log(np.exp(row).sum())
        best = np.argsort(-row, kind="stable")[: self._top]
        token = int(self._tokens[len(step.tokens[0])])
        self.found.append(
            TokenLogprob(
                self._engine.piece(token),
                float(row[token]),
                tuple((self._engine.piece(i), float(row[i])) for i in best),
            )
        )
        return step.logits
