"""The output file: lines that are kept for good one by one, so that a batch goes on where it was killed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from aisp_local.cli.output import print_answer
from aisp_local.errors import InputError
from aisp_local.files import check_output, hold, write_output
from aisp_local.finite import finite
from aisp_local.jsonl import append, whole_lines

_BEGIN = b'{"line": '
"""Of every line, so that a file that is none of ours is not taken for one that was being written."""
_NONE = "is no answer of `generate --input`; give another file to -o"  # such a file's line


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
        try:
            self._held = path.open("ab")
        except OSError as error:
            raise InputError(f"{path} cannot be written ({error.strerror}); choose another path") from error
        hold(self._held, f"{path} is being written by another process; wait for it, or give another file to -o")

    def add(self, line: int, entry: Mapping[str, Any]) -> None:
        """Append and keep it, whatever happens next. Raises InputError where that cannot be."""
        text = json.dumps(finite(dict(entry)), ensure_ascii=False)
        if self.path is None:
            print_answer(text)
            return
        data = text.encode("utf-8", "replace") + b"\n"
        if self._kept and self._held is None:
            self._hold(self.path)
        append(self.path, data)
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
        lines = whole_lines(path, _BEGIN, _NONE)
        for i, text in enumerate(lines, 1):
            line, key, failed = self._entry(path, i, text)
            if failed:  # tried again, and its line may have been mended
                continue
            self._check(path, i, line, key, keys)
            self.done.setdefault(line, text + b"\n")
        self._ordered = list(self.done)
        if len(self.done) < len(lines):
            write_output(path, b"".join(self.done.values()))
        self._hold(path)  # a file that was written anew is another

    def _entry(self, path: Path, i: int, text: bytes) -> tuple[int, str, bool]:
        try:
            entry = json.loads(text)
            line, key = entry["line"], entry["key"]
        except (ValueError, KeyError, TypeError, RecursionError):
            line = key = None
        if not isinstance(line, int) or not isinstance(key, str):
            raise InputError(f"{path}, line {i} {_NONE}")
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
