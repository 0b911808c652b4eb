"""Finds the patched llama-cpp-python, checks it, and owns the pointers that it hands out."""

from __future__ import annotations

import ctypes
import os
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from aisp_local.errors import BindingError, DecodeError, InputError, ModelError
from aisp_local.types import FloatArray

INSTALL = "install it with: pip install ./patches (in a checkout of aisp-local)"
SYMBOLS = ("llama_init_control", "llama_set_control", "llama_clear_control", "llama_set_prelogits")
MAX_SEQUENCES = 256  # LLAMA_MAX_SEQ

_FLOAT_POINTER = ctypes.POINTER(ctypes.c_float)
_lock = threading.Lock()
_llama: Any = None
_log_callback: Any = None  # llama.cpp keeps the pointer: this must outlive it
_log_lines: deque[str] = deque(maxlen=50)


def _keep_log(level: int, text: bytes, _user_data: ctypes.c_void_p) -> None:
    if level >= 4 or (level == 5 and _log_lines):  # 4: error, 5: the line goes on
        line = text.decode("utf-8", "replace").strip()
        if line:
            _log_lines.append(line)


def last_log() -> str:
    """The last error that llama.cpp logged, on one line; empty if there was none."""
    return _log_lines[-1] if _log_lines else ""


def binding() -> ModuleType:
    """The patched ``llama_cpp`` module, imported and initialised once.

    Raises BindingError when it is missing, is the stock one, or its library does not load.
    """
    global _llama, _log_callback
    with _lock:
        if _llama is None:
            # Threads that spin between graph nodes starve each other on a busy host.
            os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
            try:
                import llama_cpp
            except ImportError as error:
                raise BindingError(f"llama-cpp-python is not installed ({error}); {INSTALL}") from error
            except Exception as error:
                raise BindingError(f"llama-cpp-python does not load ({error}); re{INSTALL}") from error
            missing = [name for name in SYMBOLS if not hasattr(llama_cpp, name)]
            if missing:
                raise BindingError(
                    f"llama-cpp-python {llama_cpp.__version__} lacks the patch of aisp-local ({missing[0]}); {INSTALL}"
                )
            _log_callback = llama_cpp.llama_log_callback(_keep_log)
            llama_cpp.llama_log_set(_log_callback, ctypes.c_void_p(0))
            llama_cpp.llama_backend_init()
            _llama = llama_cpp
    return _llama  # type: ignore[no-any-return]


def check_model_file(path: Path) -> None:
    """Refuse what cannot be a model before llama.cpp sees it. Raises ModelError."""
    if not path.exists():
        raise ModelError(f"model file {path} does not exist; check the path given with -m")
    if path.is_dir():
        raise ModelError(f"{path} is a folder; give the .gguf file inside it")
    try:
        with path.open("rb") as file:
            head = file.read(24)
    except OSError as error:
        raise ModelError(f"model file {path} cannot be read ({error.strerror})") from error
    if head[:4] != b"GGUF":
        raise ModelError(f"{path} is not a GGUF file; convert the model to GGUF first")
    if len(head) < 24:
        raise ModelError(f"{path} is truncated; download or copy it again")
    if int.from_bytes(head[8:16], "little") == 0:
        raise ModelError(f"{path} holds a vocabulary only, no weights; give a complete model")


class Model:
    """A loaded GGUF model and its vocabulary. Closed by ``close`` or on deletion."""

    def __init__(self, path: str | os.PathLike[str], *, n_gpu_layers: int | None = None) -> None:
        self.path = Path(path)
        check_model_file(self.path)
        self._llama = binding()
        params = self._llama.llama_model_default_params()
        if n_gpu_layers is not None:
            params.n_gpu_layers = n_gpu_layers
        _log_lines.clear()
        self._model = self._llama.llama_model_load_from_file(os.fsencode(self.path), params)
        if not self._model:
            raise ModelError(
                f"{self.path} cannot be loaded as a model ({last_log() or 'no reason given'}); "
                "it may be truncated or of an unsupported kind: download or convert it again"
            )
        self.vocab = self._llama.llama_model_get_vocab(self._model)
        self.d = int(self._llama.llama_model_n_embd(self._model))
        self.n_vocab = int(self._llama.llama_vocab_n_tokens(self.vocab))
        self.n_ctx_train = int(self._llama.llama_model_n_ctx_train(self._model))
        self.has_decoder = bool(self._llama.llama_model_has_decoder(self._model))
        if not self.has_decoder:
            self.close()
            raise ModelError(f"{self.path} is an encoder; it cannot generate text")
        self._pieces: dict[int, bytes] = {}
        self.eog: npt.NDArray[np.bool_] = np.fromiter(
            (self._llama.llama_vocab_is_eog(self.vocab, i) for i in range(self.n_vocab)),
            dtype=np.bool_,
            count=self.n_vocab,
        )

    @property
    def pointer(self) -> Any:
        if not self._model:
            raise InputError("the model is closed")
        return self._model

    def meta(self, key: str) -> str | None:
        """The value of a metadata key as text; None if the file lacks it."""
        size = 256
        while True:
            buffer = ctypes.create_string_buffer(size)
            length = self._llama.llama_model_meta_val_str(self.pointer, key.encode(), buffer, size)
            if length < 0:
                return None
            if length < size:
                return buffer.value.decode("utf-8", "replace")
            size = length + 1

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one token takes in an F16 KV cache; 0 if the file does not say."""
        architecture = self.meta("general.architecture") or ""
        layers = int(self._llama.llama_model_n_layer(self.pointer))
        heads = max(1, int(self._llama.llama_model_n_head(self.pointer)))
        heads_kv = int(self._llama.llama_model_n_head_kv(self.pointer))
        key = int(self.meta(f"{architecture}.attention.key_length") or self.d // heads)
        value = int(self.meta(f"{architecture}.attention.value_length") or self.d // heads)
        return layers * heads_kv * (key + value) * 2

    def chat_template(self) -> str | None:
        template = self._llama.llama_model_chat_template(self.pointer, None)
        return template.decode("utf-8", "replace") if template else None

    def token_text(self, token: int) -> str:
        """The text of a special token; empty for -1 (the model has none)."""
        if token < 0:
            return ""
        text: bytes = self._llama.llama_vocab_get_text(self.vocab, token)
        return text.decode("utf-8", "replace")

    @property
    def bos(self) -> int:
        return int(self._llama.llama_vocab_bos(self.vocab))

    @property
    def eos(self) -> int:
        return int(self._llama.llama_vocab_eos(self.vocab))

    @property
    def adds_bos(self) -> bool:
        return bool(self._llama.llama_vocab_get_add_bos(self.vocab))

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> npt.NDArray[np.int32]:
        data = text.encode("utf-8", "replace")
        size = len(data) + 16
        while True:
            tokens = (self._llama.llama_token * size)()
            n = self._llama.llama_tokenize(self.vocab, data, len(data), tokens, size, add_special, parse_special)
            if n >= 0:
                return np.array(tokens[:n], dtype=np.int32)
            size = -n

    def piece(self, token: int) -> bytes:
        """The bytes of a token; empty for control tokens."""
        cached = self._pieces.get(token)
        if cached is None:
            size = 64
            while True:
                buffer = ctypes.create_string_buffer(size)
                n = self._llama.llama_token_to_piece(self.vocab, token, buffer, size, 0, False)
                if n >= 0:
                    break
                size = -n
            cached = self._pieces[token] = buffer.raw[:n]
        return cached

    def close(self) -> None:
        if getattr(self, "_model", None):
            self._llama.llama_model_free(self._model)
            self._model = None

    def __del__(self) -> None:
        self.close()


class Context:
    """A llama.cpp context with one unified KV cache: sequences, batches, controls, read-back."""

    def __init__(
        self,
        model: Model,
        *,
        n_ctx: int,
        n_seq_max: int,
        n_batch: int = 512,
        n_ubatch: int = 512,
        n_threads: int | None = None,
    ) -> None:
        self.model = model
        self._llama = llama = binding()
        params = llama.llama_context_default_params()
        params.n_ctx = n_ctx
        params.n_batch = max(n_batch, n_seq_max)
        params.n_ubatch = max(n_ubatch, n_seq_max)
        params.n_seq_max = n_seq_max
        params.kv_unified = True  # a split cache costs up to twice when one row has finished
        params.pooling_type = llama.LLAMA_POOLING_TYPE_NONE  # pre-logits are read per row
        params.no_perf = False
        if n_threads is not None:
            params.n_threads = params.n_threads_batch = n_threads
        _log_lines.clear()
        self._ctx = llama.llama_init_from_model(model.pointer, params)
        if not self._ctx:
            raise DecodeError(
                f"llama.cpp could not make a context of {n_ctx} tokens "
                f"({last_log() or 'no reason given'}); ask for fewer rollouts or tokens"
            )
        self.n_ctx, self.n_seq_max, self.n_batch = n_ctx, n_seq_max, int(params.n_batch)
        self.n_threads = int(llama.llama_n_threads(self._ctx))
        self._memory = llama.llama_get_memory(self._ctx)
        self._control_steps = 0
        self._control_set = False
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

    def decode(
        self,
        tokens: npt.ArrayLike,
        positions: npt.ArrayLike,
        sequences: npt.ArrayLike,
        *,
        outputs: bool,
    ) -> None:
        """Decode one batch: token i of sequence ``sequences[i]`` at ``positions[i]``.

        With ``outputs`` every token is an output row, in the order of the batch; else none is.
        """
        n = len(np.atleast_1d(tokens))
        self._token[:n] = tokens
        self._pos[:n] = positions
        self._seq_pointers[:n] = self._seq_table.ctypes.data + 4 * np.asarray(sequences, np.uintp)
        self._logits[:n] = outputs
        self._batch.n_tokens = n
        code = self._llama.llama_decode(self.pointer, self._batch)
        self._n_outputs = n if outputs and code == 0 else 0
        if code == 1:
            raise DecodeError(f"the KV cache of {self.n_ctx} tokens is full; ask for fewer rollouts or tokens")
        if code != 0:
            raise DecodeError(f"llama.cpp failed to decode (code {code}): {last_log()}")

    def _rows(self, pointer: Any, width: int) -> FloatArray:
        if not pointer:
            raise DecodeError("llama.cpp returned no outputs")
        return np.ctypeslib.as_array(ctypes.cast(pointer, _FLOAT_POINTER), shape=(self._n_outputs, width))

    def logits(self) -> FloatArray:
        """View [rows, V] of the last batch's logits; the next decode overwrites it."""
        return self._rows(self._llama.llama_get_logits(self.pointer), self.model.n_vocab)

    def prelogits(self) -> FloatArray:
        """View [rows, d] of the last batch's unperturbed pre-logits; see ``want_prelogits``."""
        return self._rows(self._llama.llama_get_embeddings(self.pointer), self.model.d)

    def want_prelogits(self, value: bool) -> None:
        kind = self._llama.LLAMA_PRELOGITS_TYPE_BASE if value else self._llama.LLAMA_PRELOGITS_TYPE_NONE
        if self._llama.llama_set_prelogits(self.pointer, kind) != 0:
            raise DecodeError(f"llama.cpp gives no pre-logits: {last_log()}")

    def clear_controls(self) -> None:
        if self._control_set:
            self._llama.llama_clear_control(self.pointer)
            self._control_set = False

    def set_controls(self, vectors: FloatArray, sequences: Sequence[int], position: int, *, held: bool) -> None:
        """Set ``vectors[i]`` [T, d] for sequence ``sequences[i]`` from ``position`` on; clear the rest."""
        n, steps, d = vectors.shape
        if d != self.model.d:
            raise InputError(f"control vectors are {d} wide; the model's pre-logits are {self.model.d}")
        if steps > self._control_steps:
            _log_lines.clear()
            self._control_steps, self._control_set = 0, False
            code = self._llama.llama_init_control(self.pointer, steps)
            if code == -2:
                architecture = self.model.meta("general.architecture")
                raise ModelError(
                    f"control is not supported for the architecture {architecture!r}; use best-of-n with this model"
                )
            if code != 0:
                raise DecodeError(
                    f"no memory for {n} control trajectories of {steps} steps ({last_log()}); "
                    "use fewer rollouts, a shorter window or a held control"
                )
            self._control_steps = steps
        self.clear_controls()
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        self._control_set = True
        for vector, sequence in zip(vectors, sequences, strict=True):
            data = vector.ctypes.data_as(_FLOAT_POINTER)
            if self._llama.llama_set_control(self.pointer, sequence, data, steps, d, position, held):
                raise DecodeError(f"llama.cpp refused the control of sequence {sequence}: {last_log()}")

    def remove(self, sequence: int, start: int = -1) -> bool:
        """Forget a sequence from position ``start`` on; False if the cache cannot do it."""
        return bool(self._llama.llama_memory_seq_rm(self._memory, sequence, start, -1))

    def fork(self, source: int, target: int) -> None:
        self._llama.llama_memory_seq_cp(self._memory, source, target, -1, -1)

    def clear(self) -> None:
        self._llama.llama_memory_clear(self._memory, True)

    def close(self) -> None:
        if getattr(self, "_ctx", None):
            self._llama.llama_free(self._ctx)
            self._ctx = None

    def __del__(self) -> None:
        self.close()


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    import aisp_local

    return {
        "aisp-local": aisp_local.__version__,
        "llama-cpp-python": str(binding().__version__),
        "numpy": np.__version__,
    }
