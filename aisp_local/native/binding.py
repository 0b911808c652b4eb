"""Finds llama-cpp-python, says whether it is the patched one, and keeps llama.cpp's log."""

from __future__ import annotations

import ctypes
import re
import sys
import threading
import warnings
from collections import deque
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from aisp_local.errors import BindingError

INSTALL = "install it with: pip install ./patches (in a checkout of aisp-local)"
SYMBOLS = (
    "llama_init_control",
    "llama_set_control",
    "llama_clear_control",
    "llama_set_prelogits",
    "llama_model_get_output_rows",
)
SAMPLE_SYMBOL = "llama_sample_rows"  # a build can do without it
OLDEST_STOCK = (0, 3, 30)

_lock = threading.Lock()
_llama: Any = None
_log_callback: Any = None  # llama.cpp keeps the pointer: this must outlive it


class _Log(threading.local):
    """What llama.cpp said in this thread."""

    def __init__(self) -> None:
        self.lines: deque[str] = deque(maxlen=50)


_log = _Log()


class FallbackWarning(UserWarning):
    """The binding is a stock build: control goes through an eval callback."""


def _keep_log(level: int, text: bytes, _user_data: ctypes.c_void_p) -> None:
    if level >= 4 or (level == 5 and _log.lines):  # 4: error, 5: the line goes on
        line = text.decode("utf-8", "replace").strip()
        if line:
            _log.lines.append(line)


def last_log() -> str:
    """The last error that llama.cpp logged in this thread since ``clear_log``, on one line; empty without one."""
    return _log.lines[-1] if _log.lines else ""


def first_log() -> str:
    """The first one, which names the cause where llama.cpp gives up step by step."""
    return _log.lines[0] if _log.lines else ""


def clear_log() -> None:
    _log.lines.clear()


def is_patched(llama: ModuleType) -> bool:
    """Whether this ``llama_cpp`` applies controls inside llama.cpp's graph."""
    return all(hasattr(llama, name) for name in SYMBOLS)


def binding() -> ModuleType:
    """The ``llama_cpp`` module, imported and initialised once.

    Warns (FallbackWarning) when it is a stock build. Raises BindingError when it is missing or too old, or when its
    library does not load.
    """
    global _llama, _log_callback
    with _lock:
        if _llama is None:
            try:
                import llama_cpp
            except ImportError as error:
                raise BindingError(f"llama-cpp-python is not installed ({error}); {INSTALL}") from error
            except Exception as error:
                raise BindingError(f"llama-cpp-python does not load ({error}); re{INSTALL}") from error
            if not is_patched(llama_cpp):
                _check_stock(str(llama_cpp.__version__))
            _log_callback = llama_cpp.llama_log_callback(_keep_log)
            llama_cpp.llama_log_set(_log_callback, ctypes.c_void_p(0))
            llama_cpp.llama_backend_init()
            _llama = llama_cpp
    return _llama  # type: ignore[no-any-return]


def _check_stock(version: str) -> None:
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
    if numbers < OLDEST_STOCK:
        oldest = ".".join(map(str, OLDEST_STOCK))
        raise BindingError(f"llama-cpp-python {version} is too old, {oldest} is the oldest that works; {INSTALL}")
    warnings.warn(
        f"llama-cpp-python {version} lacks the patch of aisp-local: control goes through a callback, "
        f"which is slower, most of all on a GPU; for the patched one, {INSTALL}",
        FallbackWarning,
        stacklevel=3,
    )


def ggml_library() -> Any:
    """The library that holds ggml's tensor functions, which the binding does not declare."""
    from llama_cpp import llama_cpp

    library: Any = llama_cpp._lib
    if not hasattr(library, "ggml_get_name"):  # Windows does not look into the libraries that this one needs
        suffix = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
        folder = Path(library._name).parent
        files = sorted(folder.glob(f"*ggml-base*{suffix}*"))
        if not files:
            raise BindingError(f"there is no ggml-base library in {folder}; re{INSTALL}")
        library = ctypes.CDLL(str(files[0]))
    return library


def build() -> str:
    """How llama.cpp was built, as it says itself, and whether controls are inside its graph."""
    llama = binding()
    features = str(llama.llama_print_system_info().decode("utf-8", "replace")).strip(" |")
    return f"{'patched' if is_patched(llama) else 'stock'}; {features}"


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    import aisp_local

    return {
        "aisp-local": aisp_local.__version__,
        "llama-cpp-python": str(binding().__version__),
        "numpy": np.__version__,
    }
