"""Checks text in llama.cpp's grammar notation before llama.cpp reads it.

llama.cpp would print what it thinks of a broken grammar, and the grammar, to standard error; parentheses nested by the
thousand would overflow its stack. What this lets pass it can read, but for rules that begin with themselves.
"""

from __future__ import annotations

import re

from aisp_local.errors import InputError

_LONGEST = 100_000  # characters, and elements once repetitions are written out
_DEEPEST = 100  # parentheses
_MOST = 2000  # repetitions, llama.cpp's own limit

_CHARACTER = r"\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[tnr\\\"\[\]])"
_TOKEN = re.compile(
    rf"""(?P<skip>[ \t]+|\#[^\r\n]*)
    |(?P<newline>\r\n|\r|\n)
    |(?P<defines>::=)
    |(?P<name>[a-zA-Z0-9-]+)
    |(?P<literal>"(?:[^"\\]|{_CHARACTER})*")
    |(?P<set>\[(?:[^\]\\]|{_CHARACTER})*\])
    |(?P<vocabulary>!?<(?:\[[0-9]{{1,9}}\]|[^>\[][^>]*)>)
    |(?P<repeat>[*+?]|\{{[ \t]*(?P<least>[0-9]+)[ \t]*(?P<comma>,[ \t]*(?P<most>[0-9]*)[ \t]*)?\}})
    |(?P<any>\.)|(?P<open>\()|(?P<close>\))|(?P<alternative>\|)""",
    re.VERBOSE,
)


def check(text: str) -> None:
    """Raises InputError with the line and column of what is no GBNF."""
    if "\0" in text:
        raise _error(text, text.index("\0"), "a zero byte")
    if len(text) > _LONGEST:
        raise InputError(f"the grammar has {len(text)} characters; at most {_LONGEST} are taken")
    _Reader(text).read()


def names_tokens(text: str) -> bool:
    """Whether a checked grammar names tokens of the vocabulary, such as ``<think>``."""
    return any(match.lastgroup == "vocabulary" for match in _TOKEN.finditer(text))


def _error(text: str, at: int, message: str) -> InputError:
    line = text.count("\n", 0, at) + 1
    return InputError(f"the grammar is wrong at line {line}, column {at - text.rfind(chr(10), 0, at)}: {message}")


class _Reader:
    """Reads rules, which end with their line, except within parentheses and after ``::=`` and ``|``."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._defined: set[str] = set()
        self._used: dict[str, int] = {}  # where first
        self._opened: list[tuple[int, int]] = []  # where, and how many rules there were
        self._repeatable = False  # there is something before
        self._size = self._within = 1  # of it: elements, and rules that llama.cpp makes of it
        self._rules = self._total = 0  # rules that llama.cpp makes of all, elements of all repetitions

    def read(self) -> None:
        at, text = 0, self._text
        rule, name, fresh = False, "", False  # within a rule; a name that waits for its ::=; a new line may follow
        while at < len(text):
            match = _TOKEN.match(text, at)
            if match is None:
                raise _error(text, at, self._unreadable(at))
            kind, begin, at = match.lastgroup, at, match.end()
            if kind == "skip":
                continue
            if not rule:
                if kind == "defines" and name:
                    rule, fresh, name = True, True, ""
                elif kind == "name" and not name:
                    name = match[0]
                    self._rules += name not in self._defined and name not in self._used
                    self._defined.add(name)
                elif kind != "newline" or name:
                    expected = (
                        "a rule must begin here, NAME ::= ...; one goes on in a new line only within ( ) or after |"
                    )
                    raise _error(text, begin, f"::= must follow the name {name}" if name else expected)
            elif kind == "newline":
                rule = bool(self._opened) or fresh
                self._repeatable &= rule
            else:
                self._element(str(kind), match, begin)
                fresh = kind == "alternative"
        if self._opened:
            raise _error(text, self._opened[-1][0], "this parenthesis is never closed")
        if name:
            raise _error(text, len(text), f"::= must follow the name {name}")
        for used, begin in self._used.items():
            if used not in self._defined:
                raise _error(text, begin, f"there is no rule {used}")
        if "root" not in self._defined:
            raise InputError("the grammar has no rule root, with which a response would begin")

    def _element(self, kind: str, match: re.Match[str], begin: int) -> None:
        if kind == "repeat":
            self._repeat(match, begin)
            return
        if kind == "defines":
            raise _error(self._text, begin, "::= stands within a rule; a new rule begins on a line of its own")
        self._size = len(match[0]) if kind in ("literal", "set") else 1
        self._within = 1
        if kind == "open":
            self._opened.append((begin, self._rules))
            self._rules += 1
            if len(self._opened) > _DEEPEST:
                raise _error(self._text, begin, f"parentheses are nested more than {_DEEPEST} deep")
        if kind == "close":
            if not self._opened:
                raise _error(self._text, begin, "this parenthesis was never opened")
            self._within = self._rules - self._opened.pop()[1]
        if kind == "name" and match[0] not in self._used:
            self._rules += match[0] not in self._defined
            self._used[match[0]] = begin
        self._repeatable = kind not in ("open", "alternative") and match[0] not in ('""', "[]", "[^]")

    def _repeat(self, match: re.Match[str], begin: int) -> None:
        if not self._repeatable:
            raise _error(self._text, begin, f"there is nothing before {match[0]} that could be repeated")
        least, most = (1 if match[0] == "+" else 0), (1 if match[0] == "?" else None)
        if match["least"] is not None:
            least = int(match["least"][:9])
            most = least if match["comma"] is None else int(match["most"][:9]) if match["most"] else None
        if most is not None and most < least:
            raise _error(self._text, begin, f"{match[0]} ends below where it begins")
        times = most or least or 1
        self._rules += 1 if most is None else most - least
        self._total += times * self._size
        if times * self._within > _MOST or self._total > _LONGEST:
            raise _error(self._text, begin, f"too many repetitions; llama.cpp takes {_MOST}, fewer of what has parts")
        self._within *= times

    def _unreadable(self, at: int) -> str:
        begin = self._text[at]
        if begin == '"':
            return 'this text is never closed, or has an escape other than \\n \\r \\t \\" \\\\ \\[ \\] \\xHH \\uHHHH'
        if begin == "[":
            return 'this set is never closed, or has an escape other than \\n \\r \\t \\" \\\\ \\[ \\] \\xHH \\uHHHH'
        return f"{begin!r} means nothing here" + ("; names have letters, digits and -" if begin == "_" else "")
