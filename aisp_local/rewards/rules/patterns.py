"""Words and regular expressions that must, or must not, occur.

Regular expressions are RE2's, whose time grows with the text and never explodes: a clock that breaks a slow match off
would make a score depend on how busy the machine is. Look-around and back-references are what that costs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from aisp_local.errors import AispError, RewardError
from aisp_local.rewards.rules.base import Rule, flag, texts, whole
from aisp_local.rewards.rules.unicode import composed, folded, marks

_MOST = 100
"""Occurrences of one word or pattern that are counted: finding all of them could take the square of the length."""


class Required(Rule):
    """-1 for each of the words and patterns that does not occur.

    ``words`` are whole words or phrases, taken literally but for how Unicode writes them (``folded``) and the blanks
    between them. ``at_least``: how many of them are enough (all of them).
    """

    def __init__(
        self,
        *,
        words: Sequence[str] = (),
        patterns: Sequence[str] = (),
        at_least: int | None = None,
        ignore_case: bool = True,
    ) -> None:
        self._sought = _Sought(words, patterns, ignore_case)
        n = len(self._sought)
        self._enough = n if at_least is None else whole("at_least", at_least, 1, n)
        self.name = "required"

    def one(self, text: str) -> float:
        return -float(max(0, self._enough - sum(self._sought.counts(text, 1))))


class Forbidden(Rule):
    """-1 for each occurrence of a word or pattern; of each, at most 100 count."""

    prefix = True

    def __init__(self, *, words: Sequence[str] = (), patterns: Sequence[str] = (), ignore_case: bool = True) -> None:
        self._sought = _Sought(words, patterns, ignore_case)
        self.name = "forbidden"

    def one(self, text: str) -> float:
        return -float(sum(self._sought.counts(text, _MOST)))


class _Sought:
    """Words and patterns to count in texts. Raises RewardError."""

    def __init__(self, words: Sequence[str], patterns: Sequence[str], ignore_case: bool) -> None:
        self._ignore_case = flag("ignore_case", ignore_case)
        self._words = [_word(word, ignore_case) for word in texts("words", words)]
        self._patterns = [_pattern(pattern, ignore_case) for pattern in texts("patterns", patterns)]
        if not len(self):
            raise RewardError("give 'words', 'patterns' or both")

    def __len__(self) -> int:
        return len(self._words) + len(self._patterns)

    def counts(self, text: str, most: int) -> Iterator[int]:
        """How often each occurs, counted up to ``most``."""
        folded_text = folded(text, self._ignore_case) if self._words else ""
        for sought, read in ((self._words, folded_text), (self._patterns, text)):
            yield from (sum(1 for _ in islice(one.finditer(read), most)) for one in sought)


def _word(word: str, ignore_case: bool) -> Any:
    """A literal between word boundaries; a regular expression of literals does not backtrack."""
    word = folded(word, ignore_case).strip()
    if not word:
        raise RewardError("'words' holds one without any visible character; give texts that can be seen")
    letter = rf"[\w{marks()}]"
    before = rf"(?<!{letter})" if re.match(letter, word) else ""
    # "can't" is another word than "can", and "won't" than "won"; "fox's" and "we'll" begin with theirs.
    after = rf"(?!{letter}|'[tT](?!{letter}))" if re.search(rf"{letter}\Z", word) else ""
    return re.compile(before + r"\s+".join(map(re.escape, word.split())) + after)


def _pattern(pattern: str, ignore_case: bool) -> Any:
    try:
        import re2
    except ImportError as error:
        raise AispError(f"RE2 does not load ({error}); install it with: pip install google-re2") from error
    options = re2.Options()
    options.log_errors, options.case_sensitive = False, not ignore_case
    try:
        compiled = re2.compile(composed(pattern), options)
    except re2.error as error:
        reason = error.args[0].decode("utf-8", "replace") if isinstance(error.args[0], bytes) else str(error)
        raise RewardError(
            f"'patterns': {pattern!r} is no regular expression of RE2 ({reason}); "
            "it has no look-around and no back-references"
        ) from error
    if compiled.search(""):
        raise RewardError(f"'patterns': {pattern!r} is found in every text, the empty one included; make it stricter")
    return compiled
