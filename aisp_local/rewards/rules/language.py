"""Which language a response is in."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from aisp_local.errors import AispError, RewardError
from aisp_local.rewards.rules.base import Rule, texts
from aisp_local.rewards.section import nearest

_READ = 20_000
"""Characters from the beginning that are read."""


class Language(Rule):
    """The probability of ``language`` less 1: 0 to -1; -1 of a text without a letter.

    ``language`` is an ISO 639 code, such as "en" or "fr". ``among``: the languages that are told apart (all 139 of
    py3langid, whose model comes in its package); fewer of them are told apart better in short texts.
    """

    def __init__(self, *, language: str, among: Sequence[str] = ()) -> None:
        if not isinstance(language, str):
            raise RewardError(f"'language' is {language!r}; give a code such as \"en\"")
        chosen = texts("among", among)
        known = tuple(_identifier(()).labels)
        for key, code in (("language", language), *(("among", code) for code in chosen)):
            if code not in known:
                raise RewardError(f"{key!r}: the language {code!r} is unknown; {nearest(code, known, 'known')}")
        if len(set(chosen)) < len(chosen):
            raise RewardError(f"'among' is {list(chosen)}; name each language once")
        if len(chosen) == 1 or (chosen and language not in chosen):
            raise RewardError(f"'among' is {list(chosen)}; it must hold {language!r} and another language")
        self._identifier = _identifier(tuple(sorted(chosen)))
        self._language = language
        self.name = f"language {language}"

    def one(self, text: str) -> float:
        text = text[:_READ]
        if not any(map(str.isalpha, text)):
            return -1.0
        return float(dict(self._identifier.rank(text))[self._language]) - 1.0


@lru_cache(maxsize=8)
def _identifier(among: tuple[str, ...]) -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise AispError(f"py3langid does not load ({error}); install it with: pip install py3langid") from error
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    if among:
        identifier.set_languages(list(among))
    return identifier
