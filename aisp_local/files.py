"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from aisp_local.errors import InputError


def write_output(path: Path, text: str) -> None:
    """Write whole or not at all; a device or a pipe is written to, never replaced."""
    target = path.resolve()
    temporary = target.with_name(f".aisp-local-{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        if target.exists() and not target.is_file():
            target.write_text(text, encoding="utf-8")
            return
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise InputError(f"{path} cannot be written ({error.strerror}); choose another path") from error


def check_output(path: Path) -> None:
    """Refuse an output that cannot be written before the search is paid for."""
    folder = path.parent
    try:
        if path.is_dir():
            raise InputError(f"{path} is a folder; give a file to write to")
        if not folder.is_dir():
            raise InputError(f"{path} cannot be written: the folder {folder} does not exist; create it")
        if not os.access(path if path.exists() else folder, os.W_OK):
            raise InputError(f"{path} cannot be written: no permission; choose another path")
    except OSError as error:  # a folder that may not be entered, a name that is too long
        raise InputError(f"{path} cannot be written ({error.strerror}); choose another path") from error
