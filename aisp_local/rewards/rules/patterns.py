"""Words and regular expressions that must, or must not, occur.

Regular expressions are RE2's, whose time grows with the text and never explodes: a clock that breaks a slow match off
would make a score depend on how busy the machine is. Look-around and back-references are what that costs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from typing import Any

from aisp_local.errors import AispError, RewardError
from aisp_local.rewards.rules.base import Rule, flag, texts, whole

_MOST = 100
"""Occurrences of one word or pattern that are counted: finding all of them could take the square of the length."""


class Required(Rule):
    """-1 for each of the words and patterns that does not occur.

    ``words`` are whole words or phrases, taken literally. ``at_least``: how many of them are enough (all of them).
    """

    def __init__(
        self,
        *,
        words: Sequence[str] = (),
        patterns: Sequence[str] = (),
        at_least: int | None = None,
        ignore_case: bool = True,
    ) -> None:
        self._counts = _counts(words, patterns, ignore_case)
        n = len(self._counts)
        self._enough = n if at_least is None else whole("at_least", at_least, 1, n)
        self.name = "required"

    def one(self, text: str) -> float:
        return -float(max(0, self._enough - sum(count(text, 1) for count in self._counts)))


class Forbidden(Rule):
    """-1 for each occurrence of a word or pattern; of each, at most 100 count."""

    prefix = True

    def __init__(self, *, words: Sequence[str] = (), patterns: Sequence[str] = (), ignore_case: bool = True) -> None:
        self._counts = _counts(words, patterns, ignore_case)
        self.name = "forbidden"

    def one(self, text: str) -> float:
        return -float(sum(count(text, _MOST) for count in self._counts))


Count = Callable[[str, int], int]
"""How often something occurs in a text, counted up to a limit."""


def _counts(words: Sequence[str], patterns: Sequence[str], ignore_case: bool) -> list[Count]:
    flag("ignore_case", ignore_case)
    literal = [_word(word.strip(), ignore_case) for word in texts("words", words)]
    free = [_pattern(pattern, ignore_case) for pattern in texts("patterns", patterns)]
    if not literal and not free:
        raise RewardError("give 'words', 'patterns' or both")
    return literal + free


def _word(word: str, ignore_case: bool) -> Count:
    """A literal between word boundaries; a regular expression of literals does not backtrack."""
    before = r"(?<!\w)" if re.match(r"\w", word) else ""
    after = r"(?!\w)" if re.search(r"\w\Z", word) else ""
    return partial(_count, re.compile(before + re.escape(word) + after, re.IGNORECASE if ignore_case else 0))


def _pattern(pattern: str, ignore_case: bool) -> Count:
    try:
        import re2
    except ImportError as error:
        raise AispError(f"RE2 does not load ({error}); install it with: pip install google-re2") from error
    options = re2.Options()
    options.log_errors, options.case_sensitive = False, not ignore_case
    try:
        compiled = re2.compile(pattern, options)
    except re2.error as error:
        reason = error.args[0].decode("utf-8", "replace") if isinstance(error.args[0], bytes) else str(error)
        raise RewardError(
            f"'patterns': {pattern!r} is no regular expression of RE2 ({reason}); "
            "it has no look-around and no back-references"
        ) from error
    if compiled.search(""):
        raise RewardError(f"'patterns': {pattern!r} is found in every text, the empty one included; make it stricter")
    return partial(_count, compiled)


def _count(compiled: Any, text: str, most: int) -> int:
    return sum(1 for _ in islice(compiled.finditer(text), most))
