"""Responses that are JSON of a certain form."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from aisp_local.errors import AispError, RewardError
from aisp_local.rewards.rules.base import Rule, flag

_MOST = 100
"""Violations that are counted."""
_OPENING, _CLOSING = re.compile(r"```(?:json)?[ \t]*\n", re.IGNORECASE), "```"


class JsonSchema(Rule):
    """0: valid; -2 + 1/k: of the right type, with k violations of the schema; -2: JSON of another type; -3: no JSON.

    ``schema`` is a JSON schema, or ``file`` the file with it. ``fenced``: a response that is one Markdown code block
    counts as what is in it. The regular expressions of a schema are matched in linear time, as those of the other
    rules, and it may refer to nothing outside itself.
    """

    PATHS = ("file",)
    COMPOSED = False  # a schema's strings are compared code point by code point
    unfinished = False

    def __init__(
        self,
        *,
        schema: Mapping[str, Any] | None = None,
        file: str | os.PathLike[str] | None = None,
        fenced: bool = False,
    ) -> None:
        if (schema is None) == (file is None):
            raise RewardError("a JSON schema needs 'schema' or 'file', one of them")
        found = _read(Path(file)) if file is not None else schema
        key = "schema" if file is None else "file"
        if not isinstance(found, Mapping):
            raise RewardError(f"{key!r}: a JSON schema must be an object, not {found!r}")
        self._validator = _validator(key, found)
        self._typed = _validator(key, {"type": found["type"]} if "type" in found else {})
        self._fenced = flag("fenced", fenced)
        self.name = "json"

    def one(self, text: str) -> float:
        if self._fenced:
            text = _unfenced(text)
        try:
            value = json.loads(text, parse_constant=_refuse)
            if not self._typed.is_valid(value):
                return -2.0
            violations = sum(1 for _, _ in zip(range(_MOST), self._validator.iter_errors(value), strict=False))
        except (ValueError, RecursionError):  # no JSON, or deeper or with larger numbers than anybody reads
            return -3.0
        return 1 / violations - 2.0 if violations else 0.0


def _unfenced(text: str) -> str:
    """What is in a code block that is all of a text; by hand, as an expression for both ends takes the square."""
    block = text.strip()
    opening = _OPENING.match(block)
    if opening is None or not block.endswith(_CLOSING) or len(block) < opening.end() + len(_CLOSING):
        return text
    return block[opening.end() : -len(_CLOSING)].rstrip(" \t").removesuffix("\n")


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _read(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RewardError(f"'file': {path} cannot be read ({error.strerror}); check the path") from error
    except (ValueError, RecursionError) as error:
        raise RewardError(f"'file': {path} is not valid JSON ({error}); repair it") from error


def _validator(key: str, schema: Mapping[str, Any]) -> Any:
    try:
        import jsonschema_rs
    except ImportError as error:
        raise AispError(f"jsonschema-rs does not load ({error}); install it with: pip install jsonschema-rs") from error

    def refuse(uri: str) -> NoReturn:
        raise ValueError(f"{uri} lies outside the schema, and nothing is fetched")

    try:
        return jsonschema_rs.validator_for(dict(schema), pattern_options=jsonschema_rs.RegexOptions(), retriever=refuse)
    except Exception as error:  # of jsonschema-rs, and what it says of Python values that no JSON has
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RewardError(f"{key!r} is not a valid JSON schema: {reason}") from error
