"""A llama.cpp context: sequences, batches, controls, read-back."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

from aisp_local.errors import BindingError, DecodeError, InputError
from aisp_local.interrupts import Uninterrupted
from aisp_local.native import lora
from aisp_local.native.binding import INSTALL, binding, clear_log, is_patched, last_log
from aisp_local.native.callback import CallbackControl, Project
from aisp_local.native.control import Control, ControlKind, Ints
from aisp_local.native.graph import GraphControl
from aisp_local.native.model import Model
from aisp_local.types import FloatArray

MAX_SEQUENCES = 256  # LLAMA_MAX_SEQ
MAX_THREADS = 512  # GGML_MAX_N_THREADS

_FLOAT_POINTER = ctypes.POINTER(ctypes.c_float)


class Context:
    """A llama.cpp context with one unified KV cache.

    ``project``: the first logits of pre-logits, against which a stock build's controls are checked.
    ``flash_attention``: None leaves the choice to llama.cpp. ``n_ctx_orig``: that of the model's position embedding
    before it was stretched; 0 leaves what the model says.
    Raises BindingError when ``control="graph"`` is asked of a stock build.
    """

    def __init__(
        self,
        model: Model,
        *,
        project: Project,
        control: ControlKind = "auto",
        n_ctx: int,
        n_seq_max: int,
        n_batch: int = 512,
        n_ubatch: int = 512,
        n_threads: int | None = None,
        flash_attention: bool | None = None,
        n_ctx_orig: int = 0,
    ) -> None:
        self.model = model
        self._ctx: Any = None
        self._memory: Any = None
        self._opened = False  # the model knows of it
        self._llama = llama = binding()
        params = llama.llama_context_default_params()
        params.n_ctx = n_ctx
        params.n_batch = max(n_batch, n_ubatch, n_seq_max)
        params.n_ubatch = max(n_ubatch, n_seq_max)
        params.n_seq_max = n_seq_max
        params.kv_unified = True  # a split cache costs up to twice when one row has finished
        params.pooling_type = llama.LLAMA_POOLING_TYPE_NONE  # pre-logits are read per row
        params.no_perf = False
        params.yarn_orig_ctx = n_ctx_orig
        if flash_attention is not None:
            params.flash_attn_type = int(flash_attention)
        if n_threads is not None:
            params.n_threads = params.n_threads_batch = n_threads
        if control == "graph" and not is_patched(llama):
            raise BindingError(f"llama-cpp-python {llama.__version__} lacks the patch of aisp-local; {INSTALL}")
        in_graph = is_patched(llama) and control != "callback"
        self._control: Control = GraphControl(model) if in_graph else CallbackControl(model, project)
        self._control.prepare(params)
        clear_log()
        with Uninterrupted():
            model.opened()
            self._opened = True
            self._ctx = llama.llama_init_from_model(model.pointer, params)
        if not self._ctx:
            raise DecodeError(
                f"llama.cpp could not make a context of {n_ctx} tokens "
                f"({last_log() or 'no reason given'}); ask for fewer rollouts or tokens"
            )
        if model.adapters and lora.apply(self._ctx, model.adapters):
            raise DecodeError(f"llama.cpp could not use the LoRA adapters: {last_log() or 'no reason given'}")
        self.n_ctx, self.n_seq_max, self.n_batch = n_ctx, n_seq_max, int(params.n_batch)
        self.flash_attention = flash_attention
        self.n_ubatch = int(params.n_ubatch)
        self.n_threads = int(llama.llama_n_threads(self._ctx))
        self._memory = llama.llama_get_memory(self._ctx)
        self._control.attach(self._ctx)
        self._n_outputs = 0
        self._make_batch()

    def _make_batch(self) -> None:
        """One batch over arrays of ours, so that a step is filled by numpy alone."""
        n = self.n_batch
        self._token = np.zeros(n, np.int32)
        self._pos = np.zeros(n, np.int32)
        self._n_seq = np.ones(n, np.int32)
        self._logits = np.zeros(n, np.int8)
        self._seq_table = np.arange(self.n_seq_max, dtype=np.int32)
        self._seq_pointers = np.zeros(n, np.uintp)
        self._placed: Ints | None = None  # the sequences of the last batch, if its tokens had outputs
        self._logits_place, self._logits_view = (0, 0), np.zeros((0, 0), np.float32)
        self._batch = self._llama.llama_batch(
            n_tokens=0,
            token=self._token.ctypes.data_as(ctypes.POINTER(self._llama.llama_token)),
            embd=None,
            pos=self._pos.ctypes.data_as(ctypes.POINTER(self._llama.llama_pos)),
            n_seq_id=self._n_seq.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            seq_id=self._seq_pointers.ctypes.data_as(ctypes.POINTER(ctypes.POINTER(self._llama.llama_seq_id))),
            logits=self._logits.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )

    @property
    def pointer(self) -> Any:
        if not self._ctx:
            raise InputError("the context is closed")
        return self._ctx

    def decode(self, tokens: npt.ArrayLike, positions: Ints, sequences: Ints, *, outputs: bool) -> None:
        """Decode one batch: token i of sequence ``sequences[i]`` at ``positions[i]``.

        With ``outputs`` every token is an output row, in the order of the batch; else none is. The same array of
        ``sequences`` again means the same sequences.
        """
        n = len(sequences)
        if sequences is not self._placed or not outputs:
            self._seq_pointers[:n] = self._seq_table.ctypes.data + 4 * sequences.astype(np.uintp)
            self._logits[:n] = outputs
            self._batch.n_tokens = n
            self._placed = sequences if outputs else None
        self._token[:n] = tokens
        self._pos[:n] = positions
        self._control.before(sequences, positions, outputs=outputs)
        with Uninterrupted():
            code = self._llama.llama_decode(self.pointer, self._batch)
        self._n_outputs = n if outputs and code == 0 else 0
        if code == 1:
            raise DecodeError(f"the KV cache of {self.n_ctx} tokens is full; ask for fewer rollouts or tokens")
        if code != 0:
            raise DecodeError(f"llama.cpp failed to decode (code {code}): {last_log()}")
        self._control.after(self.logits)

    def encode(self, tokens: npt.ArrayLike, sequences: int) -> None:
        """Run an encoder-decoder model's encoder on at most ``n_ubatch`` tokens; sequences 1.. will see the result."""
        n = len(np.atleast_1d(tokens))
        self._placed = None
        self._token[:n] = tokens
        self._pos[:n] = np.arange(n)
        self._n_seq[:n] = sequences
        self._seq_pointers[:n] = self._seq_table.ctypes.data + 4
        self._logits[:n] = True
        self._batch.n_tokens = n
        none = np.zeros(0, np.int64)
        self._control.before(none, none, outputs=False)
        with Uninterrupted():
            code = self._llama.llama_encode(self.pointer, self._batch)
            self._n_seq[:n], self._n_outputs = 1, 0
        if code != 0:
            raise DecodeError(f"llama.cpp failed to encode the prompt (code {code}): {last_log()}")

    def logits(self) -> FloatArray:
        """View [rows, V] of the last batch's logits; the next decode overwrites it."""
        pointer = self._llama.llama_get_logits(self.pointer)
        if not pointer:
            raise DecodeError("llama.cpp returned no outputs")
        place = ctypes.addressof(pointer.contents), self._n_outputs
        if place != self._logits_place:  # a view takes longer to make than all else here
            shape = self._n_outputs, self.model.n_vocab
            self._logits_view = np.ctypeslib.as_array(ctypes.cast(pointer, _FLOAT_POINTER), shape=shape)
            self._logits_place = place
        return self._logits_view

    def prelogits(self) -> FloatArray:
        """View [rows, d] of the last batch's unperturbed pre-logits; see ``want_prelogits``."""
        return self._control.prelogits(self._n_outputs)

    def want_prelogits(self, value: bool) -> None:
        self._control.want_prelogits(value)

    def clear_controls(self) -> None:
        self._control.clear()

    def set_control(self, sequence: int, vectors: FloatArray, position: int, *, held: bool) -> None:
        """Add ``vectors`` [T, d] to a sequence's pre-logits from ``position`` on; ``held``: the last one on and on."""
        d = vectors.shape[1]
        if d != self.model.d:
            raise InputError(f"control vectors are {d} wide; the model's pre-logits are {self.model.d}")
        self._control.set(sequence, np.ascontiguousarray(vectors, dtype=np.float32), position, held=held)

    def clear_control(self, sequence: int) -> None:
        self._control.unset(sequence)

    def remove(self, sequence: int, start: int = -1) -> bool:
        """Forget a sequence from position ``start`` on; False if the cache cannot do it."""
        return bool(self._llama.llama_memory_seq_rm(self._memory, sequence, start, -1))

    def first_position(self, sequence: int) -> int:
        """The lowest position of a sequence that the whole cache still holds; -1 for an empty one."""
        return int(self._llama.llama_memory_seq_pos_min(self._memory, sequence))

    def fork(self, source: int, target: int) -> None:
        self._llama.llama_memory_seq_cp(self._memory, source, target, -1, -1)

    def clear(self) -> None:
        self._llama.llama_memory_clear(self._memory, True)

    def close(self) -> None:
        if not self._opened:
            return
        with Uninterrupted():
            if self._ctx:
                self._llama.llama_free(self._ctx)
                self._ctx = self._memory = None
            self._opened = False
            self.model.released()

    def __del__(self) -> None:
        self.close()
