"""A GGUF model and its vocabulary, and the pointers to them."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from aisp_local.errors import InputError, ModelError
from aisp_local.interrupts import Uninterrupted
from aisp_local.native import lora
from aisp_local.native.binding import binding, clear_log, first_log, is_patched
from aisp_local.types import FloatArray


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
    """A loaded GGUF model and its vocabulary. Closed by ``close`` or on deletion, but not before its contexts.

    Safe to share between threads: none uses a pointer while another frees it. ``loras``: adapters of its weights.
    ``described``: its weights are not read, where the build can do without; it can be asked about and not run.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        n_gpu_layers: int | None = None,
        loras: Sequence[lora.Lora] = (),
        described: bool = False,
    ) -> None:
        self._model: Any = None
        self.loras = tuple(loras)
        self._contexts, self._closing = 0, False
        self._lock = threading.RLock()
        self.path = Path(path)
        check_model_file(self.path)
        for each in self.loras:
            each.check()
        self._llama = binding()
        self._n_gpu_layers = n_gpu_layers
        self._described = described
        self._file = self._identity()
        self.overrides: dict[str, int] = {}
        self.adapters: list[tuple[Any, float]] = []  # pointers, and what their products are multiplied with
        self._load()
        if self._llama.llama_vocab_type(self.vocab) == self._llama.LLAMA_VOCAB_TYPE_NONE:  # would abort the process
            self.close()
            raise ModelError(f"{self.path} holds no tokenizer, so no text can go in or out; convert the model again")
        self.d = int(self._llama.llama_model_n_embd(self._model))
        self.n_vocab = int(self._llama.llama_vocab_n_tokens(self.vocab))
        self.n_ctx_train = int(self._llama.llama_model_n_ctx_train(self._model))
        self.has_decoder = bool(self._llama.llama_model_has_decoder(self._model))
        if not self.has_decoder:
            self.close()
            raise ModelError(f"{self.path} is an encoder; it cannot generate text")
        if self._llama.llama_model_is_diffusion(self._model):
            self.close()
            raise ModelError(f"{self.path} is a diffusion model; aisp-local needs one that writes from left to right")
        self.on_gpu = bool(self._llama.llama_supports_gpu_offload()) and n_gpu_layers != 0
        self.n_parameters = int(self._llama.llama_model_n_params(self._model))
        self.bos, self.eos = int(self._llama.llama_vocab_bos(self.vocab)), int(self._llama.llama_vocab_eos(self.vocab))
        self.newline = int(self._llama.llama_vocab_nl(self.vocab))
        self.adds_bos = bool(self._llama.llama_vocab_get_add_bos(self.vocab))
        token = int(self._llama.llama_model_decoder_start_token(self._model))
        self.decoder_start = token if token >= 0 else self.bos  # of an encoder-decoder model's response
        self.n_swa = max(0, int(self._llama.llama_model_n_swa(self._model)))
        self.n_head = max(1, int(self._llama.llama_model_n_head(self._model)))
        self.has_encoder = bool(self._llama.llama_model_has_encoder(self._model))
        self._pieces: dict[int, bytes] = {}
        self._special_pieces: dict[int, bytes] = {}
        vocab = self.vocab
        self.eog: npt.NDArray[np.bool_] = np.fromiter(
            (self._llama.llama_vocab_is_eog(vocab, i) for i in range(self.n_vocab)),
            dtype=np.bool_,
            count=self.n_vocab,
        )

    def _identity(self) -> list[tuple[int, ...]]:
        """What tells the files from others of the same names."""
        found = [path.stat() for path in (self.path, *(each.path for each in self.loras))]
        return [(one.st_dev, one.st_ino, one.st_size, one.st_mtime_ns) for one in found]

    def _load(self) -> None:
        params = self._llama.llama_model_default_params()
        if self._n_gpu_layers is not None:
            params.n_gpu_layers = self._n_gpu_layers
        if self._described and hasattr(params, "no_alloc") and hasattr(params, "load_mode"):
            params.no_alloc, params.load_mode = True, self._llama.LLAMA_LOAD_MODE_NONE  # a mapped file is allocated
        overrides = (self._llama.llama_model_kv_override * (len(self.overrides) + 1))()  # the last one's key is empty
        for override, (key, value) in zip(overrides, self.overrides.items(), strict=False):
            override.tag, override.key = self._llama.LLAMA_KV_OVERRIDE_TYPE_INT, key.encode()
            override.value.val_i64 = value
        params.kv_overrides = overrides
        clear_log()
        with Uninterrupted():
            self._model = self._llama.llama_model_load_from_file(os.fsencode(self.path), params)
        if not self._model:
            raise ModelError(
                f"{self.path} cannot be loaded as a model ({first_log() or 'no reason given'}); "
                "it may be truncated or of an unsupported kind: download or convert it again"
            )
        try:
            self.adapters = [(lora.load(self._model, each), each.scale) for each in self.loras]
        except BaseException:
            self._free()  # a model without its adapters is another one
            raise

    def reload(self, overrides: Mapping[str, int]) -> None:
        """Load it again with other metadata than the file's; no context may be open. A no-op if nothing changes."""
        with self._lock:
            if dict(overrides) == self.overrides:
                return
            if self._contexts:
                raise InputError(f"{self.path} must be loaded again, and another context of it is open; close that one")
            try:
                same = self._identity() == self._file
            except OSError as error:
                raise ModelError(
                    f"{error.filename} is gone ({error.strerror}); the model must be loaded again"
                ) from error
            if not same:
                raise ModelError(f"{self.path} or an adapter has changed since it was loaded; load it again")
            self._free()
            self.overrides = dict(overrides)
            self._load()

    def _free(self) -> None:
        """The model, and with it its adapters."""
        with Uninterrupted():
            if self._model:
                self._llama.llama_model_free(self._model)
            self._model, self.adapters = None, []

    @property
    def pointer(self) -> Any:
        with self._lock:
            if self._closing:
                raise InputError("the model is closed")
            if not self._model:  # it could not be loaded again
                self._load()
            return self._model

    @property
    def vocab(self) -> Any:
        return self._llama.llama_model_get_vocab(self.pointer)

    def meta(self, key: str) -> str | None:
        """The value of a metadata key as text; None if the file lacks it."""
        size = 256
        while True:
            buffer = ctypes.create_string_buffer(size)
            with self._lock:
                length = self._llama.llama_model_meta_val_str(self.pointer, key.encode(), buffer, size)
            if length < 0:
                return None
            if length < size:
                return buffer.value.decode("utf-8", "replace")
            size = length + 1

    def metadata(self) -> dict[str, str]:
        """Every metadata key that is not an array, with its value as text."""
        found = {}
        with self._lock:
            for i in range(self._llama.llama_model_meta_count(self.pointer)):
                buffer = ctypes.create_string_buffer(256)
                if self._llama.llama_model_meta_key_by_index(self.pointer, i, buffer, 256) < 256:
                    key = buffer.value.decode("utf-8", "replace")
                    found[key] = self.meta(key) or ""
        return found

    @property
    def head_width(self) -> int:
        """Width of an attention head's keys."""
        architecture = self.meta("general.architecture") or ""
        return int(self.meta(f"{architecture}.attention.key_length") or self.d // self.n_head)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one token takes in an F16 KV cache; 0 if the file does not say."""
        architecture = self.meta("general.architecture") or ""
        layers = int(self._llama.llama_model_n_layer(self.pointer))
        heads_kv = int(self._llama.llama_model_n_head_kv(self.pointer))
        key = self.head_width
        value = int(self.meta(f"{architecture}.attention.value_length") or self.d // self.n_head)
        return layers * heads_kv * (key + value) * 2

    def output_rows(self, start: int, stop: int) -> FloatArray | None:
        """Rows of the output matrix [stop - start, d] from where the backend keeps them; None where it cannot."""
        if not is_patched(self._llama):
            return None
        rows = np.empty((stop - start, self.d), np.float32)
        data = rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        with self._lock:
            if self._closing:
                return None
            code = self._llama.llama_model_get_output_rows(self.pointer, start, stop - start, data)
        return None if code else rows

    def chat_template(self) -> str | None:
        with self._lock:
            template = self._llama.llama_model_chat_template(self.pointer, None)
        return template.decode("utf-8", "replace") if template else None

    def token_text(self, token: int) -> str:
        """The text of a special token; empty for -1 (the model has none)."""
        if token < 0:
            return ""
        with self._lock:
            text: bytes = self._llama.llama_vocab_get_text(self.vocab, token)
        return text.decode("utf-8", "replace")

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> npt.NDArray[np.int32]:
        data = text.encode("utf-8", "replace")
        size = len(data) + 16
        while True:
            tokens = (self._llama.llama_token * size)()
            with self._lock:
                n = self._llama.llama_tokenize(self.vocab, data, len(data), tokens, size, add_special, parse_special)
            if n >= 0:
                return np.array(tokens[:n], dtype=np.int32)
            size = -n

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes of a token; empty for control tokens, unless ``special`` names are wanted."""
        pieces = self._special_pieces if special else self._pieces
        cached = pieces.get(token)
        if cached is None:
            size = 64
            while True:
                buffer = ctypes.create_string_buffer(size)
                with self._lock:
                    n = self._llama.llama_token_to_piece(self.vocab, token, buffer, size, 0, special)
                if n >= 0:
                    break
                size = -n
            cached = pieces[token] = buffer.raw[:n]
        return cached

    @cached_property
    def silent(self) -> npt.NDArray[np.bool_]:
        """Tokens [V] that say nothing and do not end a response: control tokens and unused ones."""
        pieces = (not self.piece(token) for token in range(self.n_vocab))
        return np.fromiter(pieces, np.bool_, self.n_vocab) & ~self.eog

    def opened(self) -> None:
        """A context is in use."""
        with self._lock:
            self._contexts += 1

    def released(self) -> None:
        """A context was freed."""
        with self._lock:
            self._contexts -= 1
            if self._closing:
                self.close()

    def close(self) -> None:
        """Free the model, now or with its last context: the collector may delete both in any order."""
        with self._lock:
            self._closing = True
            if self._model and self._contexts == 0:
                self._free()

    def __del__(self) -> None:
        self.close()
