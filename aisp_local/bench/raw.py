"""The yardstick: a loop over ``llama_decode`` that decodes given tokens, with no sampling and no control."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from aisp_local.errors import DecodeError
from aisp_local.native import Model
from aisp_local.native.binding import binding

Tokens = npt.NDArray[np.int32]


class RawLoop:
    """Rows that replay rollouts, in a context with the settings of the engine that it is compared to."""

    def __init__(
        self, model: Model, *, rows: int, n_ctx: int, threads: int, flash_attention: bool | None, batch: int = 512
    ) -> None:
        self._llama: Any = binding()
        params = self._llama.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.kv_unified = n_ctx, rows + 1, True
        params.n_batch = params.n_ubatch = self._size = batch
        params.n_threads = params.n_threads_batch = threads
        if flash_attention is not None:
            params.flash_attn_type = int(flash_attention)
        self.context = self._llama.llama_init_from_model(model.pointer, params)
        self._memory = self._llama.llama_get_memory(self.context)
        self._batch = self._llama.llama_batch_init(batch, 0, 1)
        view = np.ctypeslib.as_array
        self._token, self._pos = view(self._batch.token, (batch,)), view(self._batch.pos, (batch,))
        self._logits = view(self._batch.logits, (batch,))
        view(self._batch.n_seq_id, (batch,))[:] = 1
        pointers = ctypes.cast(self._batch.seq_id, ctypes.POINTER(ctypes.c_void_p))
        self._sequence = [view(ctypes.cast(pointers[i], ctypes.POINTER(ctypes.c_int32)), (1,)) for i in range(batch)]

    def _decode(self, tokens: Any, positions: Any, sequences: Sequence[int], output: bool) -> None:
        n = len(tokens)
        self._batch.n_tokens = n
        self._token[:n], self._pos[:n], self._logits[:n] = tokens, positions, output
        for i, sequence in enumerate(sequences):
            self._sequence[i][0] = sequence
        if self._llama.llama_decode(self.context, self._batch) != 0:
            raise DecodeError("llama_decode failed")

    def start(self, prompt: Tokens, rows: int) -> None:
        """A prompt, and rows 0 to ``rows`` - 1 after it."""
        self._llama.llama_memory_clear(self._memory, False)
        for start in range(0, len(prompt), self._size):
            part = prompt[start : start + self._size]
            self._decode(part, np.arange(start, start + len(part)), [0] * len(part), False)
        self._llama.llama_synchronize(self.context)
        for row in range(rows):
            self._llama.llama_memory_seq_cp(self._memory, 0, row + 1, -1, -1)

    def step(self, tokens: Tokens, position: int) -> None:
        """A token for every row."""
        self._decode(tokens, position, [row + 1 for row in range(len(tokens))], True)

    def logits(self, rows: int, size: int) -> npt.NDArray[np.float32]:
        """View [rows, size] of the last step's logits."""
        pointer = self._llama.llama_get_logits(self.context)
        return np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), shape=(rows, size))

    def prefill(self, tokens: Tokens) -> float:
        """Seconds for a batch of tokens of one sequence, at most ``batch`` of them, without logits."""
        self._llama.llama_memory_clear(self._memory, False)
        begin = time.perf_counter()
        self._decode(tokens, np.arange(len(tokens)), [0] * len(tokens), False)
        self._llama.llama_synchronize(self.context)
        return time.perf_counter() - begin

    def replay(self, prompt: Tokens, rollouts: Sequence[Tokens]) -> float:
        """Seconds from after the prompt's last token but one to the end of all rollouts."""
        position = len(prompt) - 1
        self.start(prompt[:-1], 0)
        steps = max(map(len, rollouts))
        columns = [[row for row, tokens in enumerate(rollouts) if len(tokens) > t] for t in range(steps)]
        inputs = [
            np.array([rollouts[row][t - 1] if t else prompt[-1] for row in column], np.int32)
            for t, column in enumerate(columns)
        ]
        begin = time.perf_counter()
        for row in range(len(rollouts)):
            self._llama.llama_memory_seq_cp(self._memory, 0, row + 1, -1, -1)
        for t, column in enumerate(columns):
            self._decode(inputs[t], position + t, [row + 1 for row in column], True)
            self._llama.llama_get_logits(self.context)
            if t + 1 < steps:
                for row in set(column) - set(columns[t + 1]):
                    self._llama.llama_memory_seq_rm(self._memory, row + 1, -1, -1)
        return time.perf_counter() - begin

    def close(self) -> None:
        self._llama.llama_batch_free(self._batch)
        self._llama.llama_free(self.context)
