"""A context on the level of llama.h, to look at the patch without the package's engine."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aisp_local.native import binding

FLOATS = ctypes.POINTER(ctypes.c_float)


class Raw:
    """One model and one context; counts the nodes of every graph that runs."""

    def __init__(
        self, path: Path, *, n_seq: int = 8, n_ubatch: int = 512, unified: bool = True, count_nodes: bool = False
    ) -> None:
        self.llama: Any = binding()
        self.model = self.llama.llama_model_load_from_file(str(path).encode(), self.llama.llama_model_default_params())
        assert self.model, path
        params = self.llama.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.n_ubatch, params.kv_unified = 512, n_seq, n_ubatch, unified
        params.n_threads = params.n_threads_batch = 2
        params.no_perf = False
        self.nodes = 0
        if count_nodes:
            self._callback = type(params.cb_eval)(self._count)
            params.cb_eval = self._callback
        self.ctx = self.llama.llama_init_from_model(self.model, params)
        assert self.ctx
        self.d = self.llama.llama_model_n_embd(self.model)
        self.n_vocab = self.llama.llama_vocab_n_tokens(self.llama.llama_model_get_vocab(self.model))
        self.batch = self.llama.llama_batch_init(512, 0, 1)

    def _count(self, tensor: Any, ask: bool, data: Any) -> bool:
        self.nodes += ask
        return False

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.llama.llama_batch_free(self.batch)
        self.llama.llama_free(self.ctx)
        self.llama.llama_model_free(self.model)

    def restart(self) -> None:
        self.llama.llama_memory_clear(self.llama.llama_get_memory(self.ctx), True)

    def decode(
        self, tokens: Sequence[int], positions: Sequence[int], sequences: Sequence[int], outputs: Sequence[bool]
    ) -> np.ndarray:
        """Logits [outputs, V]; ``nodes`` then holds how many nodes ran."""
        self.batch.n_tokens = len(tokens)
        for i, (token, position, sequence, out) in enumerate(zip(tokens, positions, sequences, outputs, strict=True)):
            self.batch.token[i], self.batch.pos[i], self.batch.logits[i] = token, position, out
            self.batch.n_seq_id[i] = 1
            self.batch.seq_id[i][0] = sequence
        self.nodes = 0
        assert self.llama.llama_decode(self.ctx, self.batch) == 0
        self.n_outputs = sum(outputs)
        return self._rows(self.llama.llama_get_logits(self.ctx), self.n_vocab)

    def _rows(self, pointer: Any, width: int) -> np.ndarray:
        return np.ctypeslib.as_array(ctypes.cast(pointer, FLOATS), shape=(self.n_outputs, width)).copy()

    def prelogits(self) -> np.ndarray:
        return self._rows(self.llama.llama_get_embeddings(self.ctx), self.d)

    def init(self, steps: int) -> int:
        return int(self.llama.llama_init_control(self.ctx, steps))

    def set(self, sequence: int, vectors: np.ndarray | None, position: int = 0, hold: bool = False) -> int:
        if vectors is None:
            return int(self.llama.llama_set_control(self.ctx, sequence, None, 0, 0, 0, False))
        data = np.ascontiguousarray(vectors, np.float32)
        return int(
            self.llama.llama_set_control(
                self.ctx, sequence, data.ctypes.data_as(FLOATS), len(data), data.shape[1], position, hold
            )
        )

    def reused(self) -> int:
        return int(self.llama.llama_perf_context(self.ctx).n_reused)
