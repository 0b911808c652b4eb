"""What the user types: a line, several, or a block of them, with completion where there is a terminal."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from aisp_local.errors import InputError

_FENCE = '"""'
_FENCED = re.compile(rf"(/\w+\s+)?{_FENCE}")
_COMMAND = re.compile(r"/([\w?-]+(\s|$)|$)")  # not a path, and not the beginning of a comment


@dataclass(frozen=True)
class Entry:
    """What was entered. ``command``: it begins with a name of a command, known or not."""

    text: str
    command: bool


class Lines:
    """Reads entries from standard input. ``complete(line)`` gives the words that its last one may become."""

    def __init__(self, complete: Callable[[str], Sequence[str]]) -> None:
        self.terminal = sys.stdin is not None and sys.stdin.isatty()
        if self.terminal:
            _prepare(complete)

    def read(self) -> Entry:
        """One entry. Three quotes begin and end a block of lines, and a line goes on after a backslash.

        Raises EOFError at the end, and InputError for a block without an end and for bytes that are not UTF-8.
        """
        line = self._line("> ")
        if fenced := _FENCED.match(line):
            command, rest = fenced[1] or "", line[fenced.end() :].rstrip()
            while not rest.endswith(_FENCE):
                rest += "\n" + self._within_block().rstrip()
            text = rest.removesuffix(_FENCE).strip("\n")
            return Entry(command + text, bool(command))
        while line.endswith("\\"):
            line = line[:-1] + "\n" + self._line("... ")
        return Entry(line, _COMMAND.match(line) is not None)

    def _within_block(self) -> str:
        try:
            return self._line("... ", strip=False)
        except EOFError as error:
            raise InputError(f"the block that begins with {_FENCE} has no end; end it with {_FENCE}") from error

    def _line(self, prompt: str, strip: bool = True) -> str:
        if sys.stdin is None:
            raise InputError("standard input is closed; a chat needs it")
        try:
            if self.terminal:
                line = input(prompt)
            else:
                data = sys.stdin.buffer.readline()
                if not data:
                    raise EOFError
                line = data.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            where, what = ("that line", "the terminal") if self.terminal else ("standard input", "it")
            raise InputError(f"{where} is not valid UTF-8; set {what} to UTF-8") from error
        return line.strip() if strip else line


def _prepare(complete: Callable[[str], Sequence[str]]) -> None:
    """Editing, history of this conversation alone, completion, and pasted lines that stay together."""
    try:
        import readline
    except ImportError:  # Windows
        return

    def completer(_word: str, state: int) -> str | None:
        found = complete(readline.get_line_buffer()[: readline.get_endidx()])
        return found[state] if state < len(found) else None

    readline.set_completer(completer)
    readline.set_completer_delims(" \t\n,=")
    if "libedit" in (readline.__doc__ or ""):
        readline.parse_and_bind("bind ^I rl_complete")
        return
    readline.parse_and_bind("tab: complete")
    readline.parse_and_bind("set enable-bracketed-paste on")  # Python turns it off
    readline.parse_and_bind(r'"\e\C-m": "\C-v\C-j"')  # Alt-Enter: a new line
