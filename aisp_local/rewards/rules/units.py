"""Words, sentences and syllables of a text, each in one pass over it."""

from __future__ import annotations

import re

_WORD = re.compile(r"\w+(?:['’-]\w+)*")
# Possessive, and only at the first mark of a run: a million full stops are one pass.
_END = re.compile(r"(?<![.!?…])[.!?…]++[\"'”’)\]]*+(?=\s|$)|[。！？]")
_VOWELS = re.compile(r"[aeiouyàáâäåèéêëìíîïòóôöøùúûüý]+")


def words(text: str) -> list[str]:
    """Runs of letters and digits, apostrophes and hyphens inside them included."""
    return _WORD.findall(text)


def sentences(text: str) -> int:
    """Pieces between full stops (``.!?…``, which a blank follows) that hold a word; 3.5 ends none."""
    return sum(_WORD.search(piece) is not None for piece in _END.split(text))


def syllables(word: str) -> int:
    """Of an English word, at least 1: groups of vowels, a silent last e not counted. An estimate."""
    word = word.lower()
    count = len(_VOWELS.findall(word))
    if word.endswith("e") and not word.endswith(("le", "ee", "ye")):
        count -= 1
    return max(1, count)
