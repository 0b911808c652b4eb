"""Controls without the patch: a callback that edits the result of the final norm between two nodes of the graph.

Costs a call into Python for every node and a round trip of the pre-logits through the host for every step. The same
sums as in the graph, so that answers agree bit for bit wherever the final norm's result is what the output matrix
multiplies; where it is not, the first controlled step is refused.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np

from aisp_local.errors import DecodeError, ModelError
from aisp_local.native.binding import INSTALL, ggml_library
from aisp_local.native.control import Ints
from aisp_local.native.model import Model
from aisp_local.types import FloatArray

Project = Callable[[FloatArray], FloatArray]
"""The first logits [rows, m] of pre-logits [rows, d], for some m."""

_EVAL = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)
_NODE = b"result_norm"


class CallbackControl:
    """``project`` says what the logits should be: see ``after``."""

    def __init__(self, model: Model, project: Project) -> None:
        self._model, self._project = model, project
        self._library = ggml_library()
        self._name = self._library.ggml_get_name
        self._name.restype, self._name.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
        self._bytes = self._library.ggml_nbytes
        self._bytes.restype, self._bytes.argtypes = ctypes.c_size_t, [ctypes.c_void_p]
        for copy in (self._library.ggml_backend_tensor_get, self._library.ggml_backend_tensor_set):
            copy.restype, copy.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
        self._eval = _EVAL(self._on_node)  # llama.cpp keeps the pointer
        self._set: dict[int, tuple[FloatArray, int, bool]] = {}  # vectors, position and held by sequence
        self._wanted = False
        self._active = False  # the running decode has something to edit or to read
        self._n = 0  # its output rows
        self._add: FloatArray | None = None  # [n, d]
        self._z = np.zeros((0, model.d), np.float32)  # [n, d], before the edit
        self._parts: list[int] = []  # the rows of each part in which it ran so far
        self._error: BaseException | None = None
        self._proved: list[int] = []  # the parts with which the edit was last seen in the logits

    def prepare(self, params: Any) -> None:
        params.cb_eval = ctypes.cast(self._eval, type(params.cb_eval))

    def attach(self, context: Any) -> None:
        pass

    def set(self, sequence: int, vectors: FloatArray, position: int, *, held: bool) -> None:
        self._set[sequence] = vectors, position, held

    def unset(self, sequence: int) -> None:
        self._set.pop(sequence, None)

    def clear(self) -> None:
        self._set = {}

    def want_prelogits(self, value: bool) -> None:
        self._wanted = value

    def _controls(self, sequences: Ints, positions: Ints) -> FloatArray | None:
        """What to add to each row [n, d]; None if nothing is."""
        added = None
        for row, sequence in enumerate(sequences.tolist() if self._set else ()):
            if sequence not in self._set:
                continue
            vectors, start, held = self._set[sequence]
            step = int(positions[row]) - start
            if step < 0 or (step >= len(vectors) and not held):
                continue
            if added is None:
                added = np.zeros((len(sequences), self._model.d), np.float32)
            added[row] = vectors[min(step, len(vectors) - 1)]
        return added

    def before(self, sequences: Ints, positions: Ints, *, outputs: bool) -> None:
        self._n, self._parts, self._error = len(sequences), [], None
        self._add = self._controls(sequences, positions) if outputs else None
        self._active = outputs and (self._wanted or self._add is not None)
        if self._active:
            self._z = np.empty((self._n, self._model.d), np.float32)

    def _on_node(self, tensor: int, ask: bool, _data: int) -> bool:
        try:
            if ask:
                return self._active and self._name(tensor) == _NODE
            self._edit(tensor)
        except BaseException as error:  # nothing may pass through llama.cpp
            self._error = error
        return not ask

    def _edit(self, tensor: int) -> None:
        """The rows after those already seen: llama.cpp may run a batch in parts, in the batch's order."""
        rows, rest = divmod(self._bytes(tensor), 4 * self._model.d)
        start = sum(self._parts)
        if rest or not 0 < rows <= self._n - start:
            raise self._unsupported("its final norm is not taken of the output rows alone")
        z = self._z[start : start + rows]
        self._library.ggml_backend_tensor_get(tensor, z.ctypes.data, 0, z.nbytes)
        self._parts.append(rows)
        if self._add is not None:
            moved = z + self._add[start : start + rows]
            self._library.ggml_backend_tensor_set(tensor, moved.ctypes.data, 0, moved.nbytes)

    def _unsupported(self, why: str) -> ModelError:
        architecture = self._model.meta("general.architecture")
        return ModelError(
            f"control of the architecture {architecture!r} needs the patched llama-cpp-python ({why}); {INSTALL}"
        )

    def after(self, logits: Callable[[], FloatArray]) -> None:
        """Raises ModelError where the edit does not do to the logits what a control should do."""
        if self._error is not None:
            raise self._error
        if not self._active:
            return
        if sum(self._parts) != self._n:
            raise self._unsupported(f"its graph has no node {_NODE.decode()!r} for every output row")
        if self._add is not None and self._proved != self._parts:
            self._prove(self._z, self._add, logits())

    def _prove(self, z: FloatArray, added: FloatArray, logits: FloatArray) -> None:
        """Did every row's logits move as W (z + v) does? Else the node is not the input of the output matrix."""
        base, expected = self._project(z), self._project(z + added)
        logits = logits[:, : base.shape[1]]
        wanted, got = expected - base, logits - base
        size = np.square(wanted).sum(axis=1)
        told = size > 1e-4 * np.square(logits).sum(axis=1)  # below that rounding could decide
        if not told.any():
            return
        share = (wanted * got).sum(axis=1)[told] / size[told]
        if not (np.abs(share - 1) < 0.3).all():
            raise self._unsupported("the result of its final norm is not the input of its output matrix")
        self._proved = self._parts

    def prelogits(self, rows: int) -> FloatArray:
        if sum(self._parts) != rows:
            raise DecodeError("the last decode read no pre-logits")
        return self._z
