"""Words, sentences and syllables of a text, each in one pass over it."""

from __future__ import annotations

import re
from functools import lru_cache

from aisp_local.rewards.rules.unicode import marks

# Possessive, and only at the first mark of a run: a million full stops are one pass.
_END = re.compile(r"(?<![.!?…])[.!?…]++[\"'”’)\]]*+(?=\s|$)|[。！？]")
_VOWELS = re.compile(r"[aeiouyàáâäåèéêëìíîïòóôöøùúûüý]+")


@lru_cache(maxsize=1)
def _word() -> re.Pattern[str]:
    letter = rf"[\w{marks()}]"
    return re.compile(rf"{letter}+(?:['’-]{letter}+)*")


def words(text: str) -> list[str]:
    """Runs of letters with their combining marks and of digits, apostrophes and hyphens inside them included."""
    return _word().findall(text)


def sentences(text: str) -> int:
    """Pieces between full stops (``.!?…``, which a blank follows) that hold a word; 3.5 ends none."""
    return sum(_word().search(piece) is not None for piece in _END.split(text))


def syllables(word: str) -> int:
    """Of an English word, at least 1: groups of vowels, a silent last e not counted. An estimate."""
    word = word.lower()
    count = len(_VOWELS.findall(word))
    if word.endswith("e") and not word.endswith(("le", "ee", "ye")):
        count -= 1
    return max(1, count)
