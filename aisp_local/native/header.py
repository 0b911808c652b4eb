"""What a GGUF file says of itself, by llama.cpp's own reader: no weights are read."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import LlamaFileType

from aisp_local.errors import ModelError
from aisp_local.interrupts import Uninterrupted
from aisp_local.native.binding import binding, clear_log, first_log, ggml_library
from aisp_local.native.model import check_model_file

_U32, _STRING = 4, 8  # gguf_type


class _Params(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]


@dataclass(frozen=True)
class Header:
    """``kind``: "model" where the file does not say. ``quantisation``: as in "Q4_K_M"; empty if it does not say."""

    architecture: str
    kind: str
    quantisation: str


def read_header(path: Path) -> Header:
    """Raises ModelError for what is no GGUF file with tensors, or a broken one."""
    check_model_file(path)
    binding()  # keeps the log
    library = _library()
    clear_log()
    with Uninterrupted():
        context = library.gguf_init_from_file(os.fsencode(path), _Params(True, None))
    if not context:
        raise ModelError(f"{path} cannot be read ({first_log() or 'no reason given'}); download or copy it again")
    try:
        file_type = _number(library, context, b"general.file_type")
        return Header(
            architecture=_text(library, context, b"general.architecture"),
            kind=_text(library, context, b"general.type") or "model",
            quantisation="" if file_type is None else _name(file_type),
        )
    finally:
        library.gguf_free(context)


def _name(file_type: int) -> str:
    try:
        name: str = LlamaFileType(file_type).name
    except ValueError:  # newer than the library
        return ""
    return name.removeprefix("MOSTLY_").removeprefix("ALL_")


def _library() -> Any:
    library = ggml_library()
    for name, result, arguments in (
        ("gguf_init_from_file", ctypes.c_void_p, [ctypes.c_char_p, _Params]),
        ("gguf_free", None, [ctypes.c_void_p]),
        ("gguf_find_key", ctypes.c_int64, [ctypes.c_void_p, ctypes.c_char_p]),
        ("gguf_get_kv_type", ctypes.c_int, [ctypes.c_void_p, ctypes.c_int64]),
        ("gguf_get_val_str", ctypes.c_char_p, [ctypes.c_void_p, ctypes.c_int64]),
        ("gguf_get_val_u32", ctypes.c_uint32, [ctypes.c_void_p, ctypes.c_int64]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def _find(library: Any, context: Any, key: bytes, kind: int) -> int | None:
    """Where a key is; None without one of this type: llama.cpp would abort the process."""
    index = int(library.gguf_find_key(context, key))
    return index if index >= 0 and library.gguf_get_kv_type(context, index) == kind else None


def _text(library: Any, context: Any, key: bytes) -> str:
    index = _find(library, context, key, _STRING)
    text: bytes = b"" if index is None else library.gguf_get_val_str(context, index)
    return text.decode("utf-8", "replace")


def _number(library: Any, context: Any, key: bytes) -> int | None:
    index = _find(library, context, key, _U32)
    return None if index is None else int(library.gguf_get_val_u32(context, index))
