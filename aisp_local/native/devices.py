"""What the binding can compute on."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

from aisp_local.native.binding import SAMPLE_SYMBOL, SYMBOLS, binding, is_patched

_KINDS = ("cpu", "gpu", "igpu", "accelerator")  # ggml_backend_dev_type


@dataclass(frozen=True)
class Device:
    """``free`` and ``total``: bytes of its memory; 0 where it does not say."""

    name: str
    description: str
    kind: str
    free: int
    total: int


@dataclass(frozen=True)
class Build:
    """The binding: ``features`` are the functions of aisp-local's patch that it has, ``system`` what llama.cpp says of
    the processor that it was compiled for."""

    version: str
    patched: bool
    features: tuple[str, ...]
    gpu: bool
    system: str
    devices: tuple[Device, ...]


def describe_build() -> Build:
    """Raises BindingError where there is no binding that works."""
    llama = binding()
    return Build(
        version=str(llama.__version__),
        patched=is_patched(llama),
        features=tuple(name for name in (*SYMBOLS, SAMPLE_SYMBOL) if hasattr(llama, name)),
        gpu=bool(llama.llama_supports_gpu_offload()),
        system=llama.llama_print_system_info().decode("utf-8", "replace").strip(" |"),
        devices=_devices(),
    )


def _devices() -> tuple[Device, ...]:
    try:
        from llama_cpp._ggml import libggml
    except ImportError:  # a binding that keeps it elsewhere
        return ()
    library: Any = libggml
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    for name, result, arguments in (
        ("ggml_backend_dev_count", size, []),
        ("ggml_backend_dev_get", pointer, [size]),
        ("ggml_backend_dev_name", ctypes.c_char_p, [pointer]),
        ("ggml_backend_dev_description", ctypes.c_char_p, [pointer]),
        ("ggml_backend_dev_type", ctypes.c_int, [pointer]),
        ("ggml_backend_dev_memory", None, [pointer, ctypes.POINTER(size), ctypes.POINTER(size)]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    found = []
    for index in range(library.ggml_backend_dev_count()):
        device = library.ggml_backend_dev_get(index)
        free, total = size(), size()
        library.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
        kind = library.ggml_backend_dev_type(device)
        found.append(
            Device(
                name=library.ggml_backend_dev_name(device).decode("utf-8", "replace"),
                description=library.ggml_backend_dev_description(device).decode("utf-8", "replace"),
                kind=_KINDS[kind] if 0 <= kind < len(_KINDS) else "other",
                free=free.value,
                total=total.value,
            )
        )
    return tuple(found)
