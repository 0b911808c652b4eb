"""Responses to score, from JSON lines or plain lines, and their scores as they come."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from aisp_local.errors import InputError
from aisp_local.jsonl import parse_row, prompt_of
from aisp_local.rewards.base import Reward, call
from aisp_local.rewards.onnx import OnnxReward
from aisp_local.types import Prompt


@dataclass(frozen=True)
class Row:
    """A response to score; ``line`` and ``index`` (of several in a line) count from 1."""

    line: int
    index: int
    prompt: Prompt
    response: str


def read_rows(lines: Iterable[str], name: str, prompt: Prompt, *, json_lines: bool | None) -> Iterator[Row]:
    """Rows of JSON lines with ``response``, ``responses`` or ``answer``, and ``prompt``, or one response a line.

    ``prompt`` is that of rows without one. ``json_lines`` None: as the first line that is not blank looks.
    Raises InputError that names the line.
    """
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if json_lines is None:
            json_lines = line.lstrip().startswith("{")
        if not json_lines:
            yield Row(number, 1, prompt, line.rstrip("\r\n"))
            continue
        try:
            row = parse_row(line)
            own = prompt_of(row["prompt"]) if row.get("prompt") is not None else prompt
            if isinstance(row.get("error"), dict):
                raise ValueError("it has an error in the place of an answer; the command that wrote it tries it again")
            responses = row["responses"] if "responses" in row else [row.get("response", row.get("answer"))]
            if not isinstance(responses, list) or not all(isinstance(text, str) for text in responses):
                raise ValueError("it needs 'response' or 'answer', a string, or 'responses', a list of strings")
        except ValueError as error:
            raise InputError(f"{name}, line {number}: {error}") from error
        for i, text in enumerate(responses, 1):
            yield Row(number, i, own, text)


def score_rows(reward: Reward, rows: Iterable[Row], at_once: int) -> Iterator[tuple[Row, float]]:
    """Each row with its score, ``at_once`` rows read before their scores come out.

    Where the rows end in an InputError, those before it get their scores first.
    """
    waiting = iter(rows)
    wrong: InputError | None = None
    while wrong is None:
        part: list[Row] = []
        try:
            for row in islice(waiting, at_once):
                part.append(row)
        except InputError as error:
            wrong = error
        if not part:
            break
        if isinstance(reward, OnnxReward):
            scores = reward.score_many([row.prompt for row in part], [row.response for row in part])
        else:
            scores = np.array([call(reward.name, reward.score, r.prompt, [r.response])[0] for r in part])
        yield from zip(part, (float(s) for s in scores), strict=True)
    if wrong is not None:
        raise wrong
