"""Texts as rules compare them: what a reader cannot tell apart is the same."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

# Apostrophes, and hyphens that are no minus; a soft hyphen is seen only at the end of a line.
_SAME = {ord(mark): "'" for mark in "‘’‛ʼ"} | {0x2010: "-", 0x2011: "-", 0xAD: None}
_TYPED = re.compile("(?<=\\w)[`´\u1ffd](?=\\w)")  # accents, which are apostrophes between letters only
_GRAPHEME_JOINER = "\u034f"
_LONGEST = 30  # combining marks in a row


def composed(text: str) -> str:
    """In composed letters (NFC): canonically equivalent texts become one."""
    return text if text.isascii() else unicodedata.normalize("NFC", _stream_safe(text))


def folded(text: str, ignore_case: bool = True) -> str:
    """Without differences of compatibility (NFKC), with straight apostrophes, and of case (Unicode's case folding)."""
    # Composed first: whether an accent follows a letter does not depend on how that letter is written.
    text = _TYPED.sub("'", composed(text.translate(_SAME)))
    if text.isascii():
        return text.lower() if ignore_case else text
    text = unicodedata.normalize("NFKC", _stream_safe(text))
    if ignore_case:
        text = unicodedata.normalize("NFKC", text.casefold())
    return text.translate(_SAME)


@lru_cache(maxsize=1)
def marks() -> str:
    """The combining marks, as the inside of a class of regular expressions: ``\\w`` has none of them."""
    found = [c for r in (range(0x300, 0x1F000), range(0xE0100, 0xE01F0)) for c in r if _combines(chr(c))]
    starts = [c for c, before in zip(found, [-2, *found], strict=False) if c != before + 1]
    ends = [c for c, after in zip(found, [*found[1:], -2], strict=True) if c != after - 1]
    return "".join(f"{chr(a)}-{chr(b)}" for a, b in zip(starts, ends, strict=True))


def _combines(character: str) -> bool:
    return unicodedata.category(character)[0] == "M"


@lru_cache(maxsize=1)
def _too_many() -> re.Pattern[str]:
    # Halfwidth sound marks are no marks themselves, but become such. What is safe already is left as it is.
    return re.compile(f"(?:(?!{_GRAPHEME_JOINER})[{marks()}\uff9e\uff9f]){{{_LONGEST}}}(?!{_GRAPHEME_JOINER})")


def _stream_safe(text: str) -> str:
    """At most 30 combining marks in a row (UAX 15, Stream-Safe Text Format): to order n takes up to their square."""
    return _too_many().sub(lambda found: found[0] + _GRAPHEME_JOINER, text)
