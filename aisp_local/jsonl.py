"""JSON-lines files, gzipped or not, with errors that name file and line."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

from aisp_local.errors import InputError
from aisp_local.files import read_bytes, write_output
from aisp_local.types import Message, Prompt

_ROLES = ("system", "user", "assistant", "tool")


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a text file, or of a gzipped one whose name ends in .gz, without a BOM. Raises InputError."""
    code = "utf-8-sig"
    try:
        with gzip.open(path, "rt", encoding=code) if path.suffix == ".gz" else path.open(encoding=code) as file:
            yield from cast(Iterable[str], file)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path} is not a complete gzip file ({error}); restore it, or unpack it") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not valid UTF-8 ({error.reason}); convert it to UTF-8") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}); check the path") from error


def whole_lines(path: Path, begin: bytes, otherwise: str) -> list[bytes]:
    """The lines of a file to which ``append`` adds, without their ends; none where there is no file.

    A last one without an end was being written when a program was killed, and is cut off. ``begin``: of every line,
    so that a file of something else is not cut. For such a file InputError says "PATH, line N" and ``otherwise``.
    """
    if not path.exists():
        return []
    *lines, torn = read_bytes(path, "choose another path").split(b"\n")
    if not torn.startswith(begin[: len(torn)]):
        raise InputError(f"{path}, line {len(lines) + 1} {otherwise}")
    if torn:
        write_output(path, b"".join(line + b"\n" for line in lines))
    return lines


def append(path: Path, data: bytes) -> None:
    """Add whole lines to a file and keep them, whatever happens next. Raises InputError where that cannot be.

    All is written in one call, so that no two programs' lines mix; what is no file is written to, without more.
    """
    try:
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        try:
            if os.write(file, data) < len(data):
                raise OSError(0, "it is full")
            if path.is_file():
                os.fsync(file)
        finally:
            os.close(file)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); make room and go on") from error


def parse_row(line: str) -> dict[str, Any]:
    """The object of a line. Raises ValueError that says what is wrong."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not valid JSON ({error})") from error
    if not isinstance(row, dict):
        raise ValueError("it is not a JSON object")
    return row


def messages(value: object, key: str) -> list[Message]:
    """A list of messages. Raises ValueError that says what is wrong with the value of ``key``."""
    if not isinstance(value, list):
        raise ValueError(f"{key!r} must be a string or a list of messages")
    found: list[Message] = []
    for i, entry in enumerate(value, 1):
        role, content = (entry.get("role"), entry.get("content")) if isinstance(entry, dict) else (None, None)
        if not (isinstance(role, str) and isinstance(content, str)):
            raise ValueError(f"{key!r}: message {i} must be an object with the strings 'role' and 'content'")
        if role not in _ROLES:
            raise ValueError(f"{key!r}: message {i} has the role {role!r}; use one of {', '.join(_ROLES)}")
        found.append({"role": role, "content": content})
    return found


def prompt_of(value: object, key: str = "prompt") -> Prompt:
    """A prompt, text or messages. Raises ValueError that says what is wrong with the value of ``key``."""
    return value if isinstance(value, str) else messages(value, key)
