"""Preference pairs in the formats that people share them in."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aisp_local.errors import InputError
from aisp_local.jsonl import messages, parse_row, prompt_of, read_lines
from aisp_local.types import Message, Prompt

_SHOWN = 5  # bad rows that an error names
_TURN = re.compile(r"\n\n(Human|Assistant):")


@dataclass(frozen=True)
class Pair:
    """Two responses to a prompt, of which people preferred the first."""

    prompt: Prompt
    chosen: str
    rejected: str
    source: str = ""


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of a JSONL file (``.gz``: gzipped). Raises InputError that names each bad row by its line.

    A row has ``chosen`` and ``rejected``: responses; lists of messages whose last is the response; or whole dialogues
    ``"\\n\\nHuman: ...\\n\\nAssistant: ..."``. ``prompt`` is text or messages, and may be left out where both sides
    hold it. ``source`` (or ``subset``) is optional; other keys are ignored.
    """
    return parse_pairs(read_lines(path), str(path))


def parse_pairs(lines: Iterable[str], name: str) -> list[Pair]:
    """The same from lines; ``name`` is what errors call them."""
    pairs: list[Pair] = []
    wrong: list[str] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            pairs.append(pair_of(parse_row(line)))
        except ValueError as error:
            wrong.append(f"{name}, line {number}: {error}")
    if wrong:
        more = f"\nand {len(wrong) - _SHOWN} more bad rows" if len(wrong) > _SHOWN else ""
        raise InputError("\n".join(wrong[:_SHOWN]) + f"{more}\nrepair or remove these rows")
    if not pairs:
        raise InputError(f"{name} holds no pairs; give rows with 'prompt', 'chosen' and 'rejected'")
    return pairs


def pair_of(row: dict[str, Any]) -> Pair:
    """The pair of a row. Raises ValueError that says what is wrong."""
    for key in ("chosen", "rejected"):
        if key not in row:
            raise ValueError(f"it lacks {key!r}; its keys are {', '.join(map(str, row)) or 'none'}")
    prompt = prompt_of(row["prompt"]) if row.get("prompt") is not None else None
    chosen_prompt, chosen = _side(row["chosen"], "chosen", prompt)
    rejected_prompt, rejected = _side(row["rejected"], "rejected", prompt)
    if chosen_prompt != rejected_prompt:
        raise ValueError("the prompts within 'chosen' and 'rejected' differ: they must answer the same one")
    source = row.get("source", row.get("subset", ""))
    return Pair(chosen_prompt, chosen, rejected, source if isinstance(source, str) else str(source))


def _side(value: object, key: str, prompt: Prompt | None) -> tuple[Prompt, str]:
    """Prompt and response of one side, whose own conversation counts where it has one."""
    if isinstance(value, str):
        turns = _dialogue(value)
        if turns is None:
            if prompt is None:
                raise ValueError(f"it lacks 'prompt', and {key!r} is no dialogue that would hold it")
            return prompt, value
    else:
        turns = messages(value, key)
    if not turns or turns[-1]["role"] != "assistant":
        raise ValueError(f"{key!r} must end with a message of the assistant")
    return _whole(turns[:-1], prompt, key), turns[-1]["content"]


def _whole(before: Sequence[Message], prompt: Prompt | None, key: str) -> Prompt:
    """The conversation before a response: what the side itself holds, else the row's prompt."""
    if not before:
        if prompt is None:
            raise ValueError(f"it lacks 'prompt', and {key!r} holds only a response")
        return prompt
    if isinstance(prompt, str) or prompt is None:  # UltraFeedback repeats the last question as a string
        return list(before)
    shared = list(prompt)
    return list(before) if list(before[: len(shared)]) == shared else [*shared, *before]


def _dialogue(text: str) -> list[Message] | None:
    """The turns of "\\n\\nHuman: ...\\n\\nAssistant: ..."; None if the text is nothing of the kind."""
    if not text.startswith("\n\nHuman:"):
        return None
    parts = _TURN.split(text)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)]
