"""llama.cpp's own grammar sampler: what a response may go on with."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

from aisp_local.errors import InputError
from aisp_local.grammar import Grammar
from aisp_local.grammar.gbnf import names_tokens
from aisp_local.native.binding import binding, clear_log, last_log
from aisp_local.native.model import Model

_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
"""llama.cpp's ``llama_token_data``."""


class Matcher:
    """Where a response is in a grammar. Raises InputError for a grammar that llama.cpp refuses.

    Tokens that say nothing (control tokens) would match by their names, which no reader of the answer sees: they are
    allowed only in a grammar that names tokens.
    """

    def __init__(self, model: Model, grammar: Grammar) -> None:
        self._llama, self._model, self._sampler = binding(), model, None
        if not model.eog.any():
            raise InputError(f"{model.path} has no end-of-generation token, with which a grammar could end")
        self._end = int(model.eog.argmax())
        self._silent = None if names_tokens(grammar.gbnf) else model.silent
        clear_log()
        sampler = self._llama.llama_sampler_init_grammar(model.vocab, grammar.gbnf.encode("utf-8", "replace"), b"root")
        if not sampler:
            reason = last_log()
            if "left recursion" in reason:
                reason = "a rule begins with itself; let it end with itself, or repeat with * or +"
            raise InputError(f"llama.cpp refuses the grammar ({reason or 'no reason given'})")
        self._sampler = sampler

    def clone(self) -> Matcher:
        """One of its own at the same place."""
        other = Matcher.__new__(Matcher)
        other._llama, other._model = self._llama, self._model
        other._end, other._silent = self._end, self._silent
        other._sampler = self._llama.llama_sampler_clone(self._sampler)
        return other

    def allowed(self, tokens: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.bool_]:
        """Which of these tokens [k] the response may go on with."""
        candidates = np.zeros(len(tokens), _CANDIDATE)
        candidates["id"] = tokens
        first = self._llama.llama_token_data.from_address(candidates.ctypes.data)
        self._apply(ctypes.pointer(first), len(tokens))
        found = np.asarray(candidates["logit"] == 0.0)
        return found if self._silent is None else found & ~self._silent[tokens]

    def allows(self, token: int) -> bool:
        """Whether the response may go on with the token."""
        candidate = self._llama.llama_token_data(id=token)
        self._apply(ctypes.pointer(candidate), 1)
        return candidate.logit == 0.0 and (self._silent is None or not self._silent[token])

    def _apply(self, data: Any, size: int) -> None:
        """Give what is not allowed the logit -inf."""
        array = self._llama.llama_token_data_array(data=data, size=size, selected=-1, sorted=False)
        self._llama.llama_sampler_apply(self._sampler, ctypes.byref(array))

    @property
    def complete(self) -> bool:
        """Whether the response may end here."""
        return self.allows(self._end)

    def accept(self, token: int) -> None:
        """Go on with a token that is allowed: over another one llama.cpp would end the process."""
        self._llama.llama_sampler_accept(self._sampler, token)

    def close(self) -> None:
        sampler, self._sampler = self._sampler, None
        if sampler:
            self._llama.llama_sampler_free(sampler)

    def __del__(self) -> None:
        self.close()
