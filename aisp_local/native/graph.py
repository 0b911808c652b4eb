"""Controls inside llama.cpp's graph: the patched build."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np

from aisp_local.errors import DecodeError, ModelError
from aisp_local.interrupts import Uninterrupted
from aisp_local.native.binding import binding, clear_log, last_log
from aisp_local.native.control import Ints
from aisp_local.native.model import Model
from aisp_local.types import FloatArray

_FLOAT_POINTER = ctypes.POINTER(ctypes.c_float)


class GraphControl:
    """The calls that the series in ``patches/`` adds to ``llama.h``."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._llama: Any = binding()
        self._context: Any = None
        self._steps = 0  # allocated
        self._wanted: bool | None = None  # pre-logits; None: not known
        self._set: dict[int, tuple[FloatArray, int, bool]] = {}  # by sequence

    def prepare(self, params: Any) -> None:
        pass

    def attach(self, context: Any) -> None:
        self._context = context

    def set(self, sequence: int, vectors: FloatArray, position: int, *, held: bool) -> None:
        self._set[sequence] = vectors, position, held
        if len(vectors) > self._steps:
            self._allocate(len(vectors))  # forgets those of the other sequences
            for other, control in self._set.items():
                self._write(other, *control)
        else:
            self._write(sequence, vectors, position, held)

    def _write(self, sequence: int, vectors: FloatArray | None, position: int, held: bool) -> None:
        steps, d = (0, self._model.d) if vectors is None else vectors.shape
        data = None if vectors is None else vectors.ctypes.data_as(_FLOAT_POINTER)
        with Uninterrupted():
            code = self._llama.llama_set_control(self._context, sequence, data, steps, d, position, held)
        if code:
            raise DecodeError(f"llama.cpp refused the control of sequence {sequence}: {last_log()}")

    def _allocate(self, steps: int) -> None:
        clear_log()
        self._steps = 0
        with Uninterrupted():
            code = self._llama.llama_init_control(self._context, steps)
        if code == -2:
            architecture = self._model.meta("general.architecture")
            raise ModelError(
                f"control is not supported for the architecture {architecture!r}; use best-of-n with this model"
            )
        if code != 0:
            raise DecodeError(
                f"no memory for control trajectories of {steps} steps ({last_log()}); "
                "use fewer rollouts, a shorter window or a held control"
            )
        self._steps = steps

    def unset(self, sequence: int) -> None:
        if sequence in self._set:
            self._write(sequence, None, 0, False)
            del self._set[sequence]  # last: what is not in here, llama.cpp must not have

    def clear(self) -> None:
        if self._set:
            self._llama.llama_clear_control(self._context)
            self._set = {}

    def want_prelogits(self, value: bool) -> None:
        kind = self._llama.LLAMA_PRELOGITS_TYPE_BASE if value else self._llama.LLAMA_PRELOGITS_TYPE_NONE
        if value == self._wanted:
            return
        with Uninterrupted():
            code = self._llama.llama_set_prelogits(self._context, kind)
            self._wanted = value if code == 0 else None
        if code:
            raise DecodeError(f"llama.cpp gives no pre-logits: {last_log()}")

    def before(self, sequences: Ints, positions: Ints, *, outputs: bool) -> None:
        pass

    def after(self, logits: Callable[[], FloatArray]) -> None:
        pass

    def prelogits(self, rows: int) -> FloatArray:
        pointer = self._llama.llama_get_embeddings(self._context)
        if not pointer:
            raise DecodeError("llama.cpp returned no pre-logits")
        return np.ctypeslib.as_array(ctypes.cast(pointer, _FLOAT_POINTER), shape=(rows, self._model.d))
