"""llama.cpp on ctypes level, for the native tests and benchmarks: nothing of aisp_local is used here.

Works on a stock build too, as long as nothing asks it for a control.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import llama_cpp as C
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Ints = Sequence[int] | npt.NDArray[np.integer[Any]]
_EVAL = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)
_FLOATS = ctypes.POINTER(ctypes.c_float)
_QUIET = C.llama_log_callback(lambda *_: None)


def _hush() -> None:
    """No log, but for what aisp_local keeps of it if it is there."""
    binding = sys.modules.get("aisp_local.native.binding")
    C.llama_log_set(getattr(binding, "_log_callback", None) or _QUIET, ctypes.c_void_p(0))


_hush()
C.llama_backend_init()

GPU_LAYERS = int(os.environ.get("AISP_TEST_GPU_LAYERS", "0"))
"""How many layers of a model go to the GPU: none, or with -1 all of them."""


@contextmanager
def logged() -> Iterator[list[str]]:
    """What llama.cpp logs meanwhile, debug messages too."""
    lines: list[str] = []
    keep = C.llama_log_callback(lambda _level, text, _data: lines.append(text.decode("utf-8", "replace")))
    C.llama_log_set(keep, ctypes.c_void_p(0))
    try:
        yield lines
    finally:
        _hush()


class Raw:
    """A model and one context of ``n_seq`` sequences; with another Raw, a context of its model."""

    def __init__(
        self,
        path: Path | Raw,
        *,
        n_seq: int = 4,
        n_ctx: int | None = None,
        n_ubatch: int = 512,
        unified: bool = True,
        threads: int = 1,
        count_nodes: bool = False,
        exact: bool = False,
        repacked: bool = True,
        pooling: int = C.LLAMA_POOLING_TYPE_NONE,
    ) -> None:
        self._owner = not isinstance(path, Raw)
        if isinstance(path, Raw):
            self.model = path.model
        else:
            params = C.llama_model_default_params()
            params.n_gpu_layers = GPU_LAYERS
            params.use_extra_bufts = repacked
            self.model = C.llama_model_load_from_file(str(path).encode(), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp could not load {path}")
        self.d = int(C.llama_model_n_embd(self.model))
        self.size = int(C.llama_vocab_n_tokens(C.llama_model_get_vocab(self.model)))
        self.nodes = 0  # of the last decode: what the scheduler asked about
        self._count = _EVAL(self._on_node)
        options = C.llama_context_default_params()
        options.n_ctx = 256 * n_seq if n_ctx is None else n_ctx
        options.n_seq_max, options.kv_unified = n_seq, unified
        options.n_batch, options.n_ubatch = max(512, n_ubatch), n_ubatch
        options.n_threads = options.n_threads_batch = threads
        options.no_perf, options.pooling_type = False, pooling
        if exact:  # no rounding of keys and values, no flash attention: as the oracle computes
            options.type_k = options.type_v = 0
            options.flash_attn_type = 0
        if count_nodes:
            options.cb_eval = ctypes.cast(self._count, type(options.cb_eval))
        self.ctx: Any = C.llama_init_from_model(self.model, options)
        if not self.ctx:
            raise RuntimeError(f"llama.cpp could not make a context for {path}")
        self.memory = C.llama_get_memory(self.ctx)
        self._batch = C.llama_batch_init(512, 0, n_seq)
        self.encodes = bool(C.llama_model_has_encoder(self.model))

    def _on_node(self, _tensor: int, ask: bool, _data: int) -> bool:
        if ask:
            self.nodes += 1
            return False
        return True

    def decode(
        self,
        tokens: Ints,
        positions: Ints,
        sequences: Ints,
        outputs: Ints | None = None,
    ) -> None:
        """One llama_decode; ``outputs``: which tokens give logits (default: all of them)."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i] = int(token), int(positions[i])
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, int(sequences[i])
            batch.logits[i] = 1 if outputs is None else int(outputs[i])
        self.nodes = 0
        status = C.llama_decode(self.ctx, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")

    def logits(self, i: int) -> Array:
        return np.ctypeslib.as_array(C.llama_get_logits_ith(self.ctx, i), (self.size,)).copy()

    def prelogits(self, i: int) -> Array | None:
        """z of batch token i, None where llama.cpp has none."""
        pointer = C.llama_get_embeddings_ith(self.ctx, i)
        return np.ctypeslib.as_array(pointer, (self.d,)).copy() if pointer else None

    def want_prelogits(self, kind: int) -> int:
        """0: none, 1: before the control, 2: after it."""
        return int(C.llama_set_prelogits(self.ctx, kind))

    def _shared(self, tokens: Ints, sequences: Sequence[int]) -> Any:
        """A batch whose tokens belong to several sequences."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = int(token), i, len(sequences), 1
            for j, sequence in enumerate(sequences):
                batch.seq_id[i][j] = sequence
        return batch

    def encode(self, tokens: Ints, sequences: Sequence[int]) -> None:
        """The input of an encoder-decoder model, seen by all the sequences."""
        status = C.llama_encode(self.ctx, self._shared(tokens, sequences))
        if status != 0:
            raise RuntimeError(f"llama_encode returned {status}")

    def decode_shared(self, token: int, sequences: Sequence[int]) -> None:
        """One token at position 0 of all the sequences."""
        status = C.llama_decode(self.ctx, self._shared([token], sequences))
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")

    def init_control(self, steps: int) -> int:
        return int(C.llama_init_control(self.ctx, steps))

    def set_control(
        self, seq: int, v: Array | None, *, p0: int = 0, hold: bool = False, n_steps: int | None = None, d: int = 0
    ) -> int:
        if v is None:
            return int(C.llama_set_control(self.ctx, seq, None, n_steps or 0, d or self.d, p0, hold))
        v = np.ascontiguousarray(v, np.float32)
        steps = len(v) if n_steps is None else n_steps
        return int(C.llama_set_control(self.ctx, seq, v.ctypes.data_as(_FLOATS), steps, d or self.d, p0, hold))

    def clear_control(self) -> None:
        C.llama_clear_control(self.ctx)

    def reset(self) -> None:
        """Empty the cache and the counters; controls stay."""
        C.llama_memory_clear(self.memory, True)
        C.llama_perf_context_reset(self.ctx)

    def fork(self, rows: Sequence[int]) -> None:
        for row in rows:
            C.llama_memory_seq_cp(self.memory, 0, row, -1, -1)

    @property
    def reused(self) -> int:
        return int(C.llama_perf_context(self.ctx).n_reused)

    def close(self) -> None:
        C.llama_batch_free(self._batch)
        C.llama_free(self.ctx)
        if self._owner:
            C.llama_model_free(self.model)

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class Schedule:
    """Forced tokens for n rows that end at different times and change places in the batch at every step."""

    prompt: npt.NDArray[np.int64]  # [P]
    tokens: npt.NDArray[np.int64]  # [n, T]: input of step t + 1
    lengths: npt.NDArray[np.int64]  # [n]: steps decoded
    orders: list[npt.NDArray[np.int64]] = field(default_factory=list)  # rows of each step

    @classmethod
    def make(cls, size: int, *, n: int = 4, steps: int = 6, prompt: int = 7, seed: int = 0) -> Schedule:
        rng = np.random.default_rng(seed)
        lengths = np.array([steps - i % (steps - 1) for i in range(n)])
        orders = [rng.permutation(np.flatnonzero(lengths > t)) for t in range(steps)]
        return cls(rng.integers(0, size, prompt), rng.integers(0, size, (n, steps)), lengths, orders)

    @property
    def p0(self) -> int:
        """Position of the first controlled input token."""
        return len(self.prompt) - 1


@dataclass(frozen=True)
class Trace:
    """What a schedule gave: NaN where a row had ended."""

    logits: Array  # [n, T, V]
    z: Array | None  # [n, T, d]
    nodes: list[int]  # of each decode
    reused: int

    def same(self, other: Trace) -> bool:
        """Bit-identical logits."""
        return self.logits.tobytes() == other.logits.tobytes()


def follow(raw: Raw, schedule: Schedule, *, z: int = 0) -> Trace:
    """Prefill prompt[:-1] once, fork it, and decode the schedule under whatever control is set.

    ``z``: which pre-logits to read, see Raw.want_prelogits.
    """
    n, steps = schedule.tokens.shape
    if z:
        raw.want_prelogits(z)
    raw.reset()
    if raw.encodes:
        raw.encode(schedule.prompt, range(n))
    head = schedule.prompt[:-1]
    raw.decode(head, range(len(head)), [0] * len(head), [0] * (len(head) - 1) + [1])
    nodes = [raw.nodes]
    raw.fork(range(1, n))
    logits = np.full((n, steps, raw.size), np.nan, np.float32)
    states = np.full((n, steps, raw.d), np.nan, np.float32) if z else None
    for t, order in enumerate(schedule.orders):
        tokens = schedule.tokens[order, t - 1] if t else np.full(len(order), schedule.prompt[-1])
        raw.decode(tokens, [schedule.p0 + t] * len(order), order)
        nodes.append(raw.nodes)
        for i, row in enumerate(order):
            logits[row, t] = raw.logits(i)
            if states is not None:
                state = raw.prelogits(i)
                assert state is not None
                states[row, t] = state
    if z:
        raw.want_prelogits(0)
    return Trace(logits, states, nodes, raw.reused)
