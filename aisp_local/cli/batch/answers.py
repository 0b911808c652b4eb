"""The output file: lines that are kept for good one by one, so that a batch goes on where it was killed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from aisp_local.cli.output import print_answer
from aisp_local.errors import InputError
from aisp_local.files import check_output, hold, write_output
from aisp_local.finite import finite

_BEGIN = b'{"line": '
"""Of every line, so that a file that is none of ours is not taken for one that was being written."""


class Answers:
    """Each entry begins with "line", that of its question, and "key", which says what was asked and how.

    ``keys``: what these are for each line that is asked now. Without a path, and for a device or a pipe, entries are
    printed and none are kept.
    """

    def __init__(self, path: Path | None, source: Path, keys: Mapping[int, str]) -> None:
        self.path, self._source = path, source
        self.done: dict[int, bytes] = {}
        """By their lines, what was answered: errors are not, they are tried again."""
        self._kept = path is not None and (path.is_file() or not path.exists())
        self._ordered: list[int] = []
        self._held: IO[bytes] | None = None
        if path is not None:
            check_output(path)
        if path is not None and path.is_file():
            try:
                self._hold(path)
                self._read(path, keys)
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """Let other processes have the file."""
        if self._held is not None:
            self._held.close()
            self._held = None

    def _hold(self, path: Path) -> None:
        """Two processes would answer the same lines twice. Another file at the path is held anew."""
        self.close()
        self._held = path.open("ab")
        hold(self._held, f"{path} is being written by another process; wait for it, or give another file to -o")

    def add(self, line: int, entry: Mapping[str, Any]) -> None:
        """Append and keep it, whatever happens next. Raises InputError where that cannot be."""
        text = json.dumps(finite(dict(entry)), ensure_ascii=False)
        if self.path is None:
            print_answer(text)
            return
        data = text.encode("utf-8", "replace") + b"\n"
        try:
            if self._kept and self._held is None:
                self._hold(self.path)
            # In one call, so that no two programs' lines mix.
            file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
            try:
                if os.write(file, data) < len(data):
                    raise OSError(0, "it is full")
                if self._kept:
                    os.fsync(file)
            finally:
                os.close(file)
        except OSError as error:
            raise InputError(f"{self.path} cannot be written ({error.strerror}); make room and go on") from error
        self._ordered.append(line)

    def order(self) -> None:
        """Put the file's lines in the order of the input, where they are not: after some were tried again."""
        if self.path is None or not self._kept or self._ordered == sorted(self._ordered):
            return
        lines = self.path.read_bytes().splitlines(keepends=True)
        pairs = sorted(zip(self._ordered, lines, strict=True), key=lambda pair: pair[0])
        write_output(self.path, b"".join(line for _, line in pairs))

    def _read(self, path: Path, keys: Mapping[int, str]) -> None:
        """What is there: a line without an end was being written when the program was killed, and is dropped."""
        try:
            data = path.read_bytes()
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror}); choose another path") from error
        *lines, torn = data.split(b"\n")
        if not torn.startswith(_BEGIN[: len(torn)]):
            raise InputError(_no_answer(path, len(lines) + 1))
        for i, text in enumerate(lines, 1):
            line, key, failed = self._entry(path, i, text)
            if failed:  # tried again, and its line may have been mended
                continue
            self._check(path, i, line, key, keys)
            self.done.setdefault(line, text + b"\n")
        self._ordered = list(self.done)
        kept = b"".join(self.done.values())
        if kept != data:
            write_output(path, kept)
            self._hold(path)

    def _entry(self, path: Path, i: int, text: bytes) -> tuple[int, str, bool]:
        try:
            entry = json.loads(text)
            line, key = entry["line"], entry["key"]
        except (ValueError, KeyError, TypeError, RecursionError):
            line = key = None
        if not isinstance(line, int) or not isinstance(key, str):
            raise InputError(_no_answer(path, i))
        return line, key, "error" in entry

    def _check(self, path: Path, i: int, line: int, key: str, keys: Mapping[int, str]) -> None:
        now = keys.get(line, "")
        if key == now:
            return
        if key.split("-")[0] == now.split("-")[0]:
            why = f"answers line {line} of {self._source} with other settings or models"
        else:
            why = f"answers something else than line {line} of {self._source} asks"
        raise InputError(f"{path}, line {i} {why}; give another file to -o, or delete {path}")


def _no_answer(path: Path, line: int) -> str:
    return f"{path}, line {line} is no answer of `generate --input`; give another file to -o"
