"""The lines of an input file: what each asks, or what is wrong with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aisp_local.cli.input import standard_input
from aisp_local.errors import InputError
from aisp_local.jsonl import messages, parse_row, read_lines
from aisp_local.types import Prompt

OWN = ("seed", "max_tokens", "budget")
"""Settings that a line may have of its own."""


@dataclass(frozen=True)
class Question:
    """``line`` counts from 1. ``hash`` is of what is asked. ``problem``: why it cannot be; then it has no prompt."""

    line: int
    hash: str
    id: str | int | None = None
    prompt: Prompt = ""
    own: Mapping[str, int] = field(default_factory=dict)
    problem: str | None = None


def read_questions(path: Path, raw: bool) -> list[Question]:
    """Those of a file of JSON lines or plain lines, gzipped or not, or of standard input for "-"; no blank lines.

    ``raw``: texts are continued, not asked. Raises InputError for a file that cannot be read, or has none.
    """
    found: list[Question] = []
    json_lines: bool | None = None
    lines = standard_input("give a file to --input").split("\n") if str(path) == "-" else read_lines(path)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if json_lines is None:
            json_lines = line.lstrip()[0] in '{"'
        found.append(_question(number, line.strip(), json_lines, raw))
    if not found:
        raise InputError(f"{path} has no prompts; write one a line")
    return found


def _question(number: int, line: str, json_lines: bool, raw: bool) -> Question:
    row: dict[str, Any] = {}
    try:
        row = _row(line) if json_lines else {"prompt": line}
        own = {key: row[key] for key in OWN if row.get(key) is not None}
        for key, value in own.items():
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"{key!r} is {value!r}; it must be a whole number")
        prompt = _prompt(row, raw)
        return Question(number, _hash([prompt, own]), _id(row), prompt, own)
    except ValueError as error:
        return Question(number, _hash(line), _id(row), problem=str(error))


def _row(line: str) -> dict[str, Any]:
    """The object of a line; a string is its prompt."""
    if not line.startswith('"'):
        return parse_row(line)
    try:
        return {"prompt": json.loads(line)}
    except ValueError as error:
        raise ValueError(f"it is not valid JSON ({error})") from error


def _prompt(row: Mapping[str, Any], raw: bool) -> Prompt:
    given = [key for key in ("prompt", "messages") if row.get(key) is not None]
    if len(given) != 1:
        raise ValueError("it needs 'prompt', a string, or 'messages', and not both")
    value = row[given[0]]
    if isinstance(value, str) and given == ["prompt"]:
        if not value.strip():
            raise ValueError("the prompt is empty")
        prompt: Prompt = value if raw else [{"role": "user", "content": value}]
    else:
        if raw:
            raise ValueError("it has messages, which --raw cannot continue")
        prompt = messages(value, given[0])
        if not prompt:
            raise ValueError(f"{given[0]!r} is empty")
    try:
        json.dumps(prompt, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError("the prompt is not valid Unicode: it has half of a surrogate pair") from error
    return prompt


def _id(row: Mapping[str, Any]) -> str | int | None:
    value = row.get("id")
    return value if isinstance(value, str | int) else None


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
