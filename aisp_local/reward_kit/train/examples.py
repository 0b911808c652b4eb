"""What a reward is trained on: preference pairs, or texts with labels or grades, from JSON lines or CSV."""

from __future__ import annotations

import csv
import hashlib
import io
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aisp_local.errors import InputError
from aisp_local.jsonl import parse_row, prompt_of, read_lines
from aisp_local.reward_kit.pairs import Pair, pair_of
from aisp_local.rewards.text import prompt_text
from aisp_local.types import Prompt

_TEXTS = ("response", "text", "completion", "answer", "content")
_LABELS = ("score", "grade", "rating", "reward", "label")
_PROMPTS = ("prompt", "instruction", "question", "context")
_SHOWN = 5  # bad rows, or labels, that an error names
_TRIES = 8  # partners that are looked at for one of about the same length
_CELL = 1 << 24  # characters of the largest CSV cell


@dataclass(frozen=True)
class Graded:
    """A response and how good people found it."""

    prompt: Prompt
    response: str
    grade: float


@dataclass(frozen=True)
class Columns:
    """Names of columns (keys); None: looked for among the usual ones. ``good``: the labels that are better."""

    text: str | None = None
    label: str | None = None
    prompt: str | None = None
    good: Sequence[str] = ()


@dataclass(frozen=True)
class Comparison:
    """Two responses of which the first is the better one; mostly to the same prompt."""

    better: tuple[Prompt, str]
    worse: tuple[Prompt, str]


@dataclass(frozen=True)
class Examples:
    """Either pairs or graded texts."""

    pairs: Sequence[Pair] = ()
    graded: Sequence[Graded] = ()

    def __len__(self) -> int:
        return len(self.pairs) + len(self.graded)

    def draw(self, seed: int) -> list[Comparison]:
        """The comparisons of a pass, in random order: each pair once, each graded text as one side of about two."""
        rng = random.Random(seed)
        if self.pairs:
            drawn = [Comparison((p.prompt, p.chosen), (p.prompt, p.rejected)) for p in self.pairs]
            rng.shuffle(drawn)
            return drawn
        return _draw(self.graded, rng)

    def split(self, share: float) -> tuple[Examples, Examples]:
        """Training and held-out part. All responses to a prompt fall on one side, whatever the order of the rows."""

        def held_out(row: Pair | Graded) -> bool:
            key = prompt_text(row.prompt) or (row.response if isinstance(row, Graded) else row.chosen)
            return int.from_bytes(hashlib.sha256(key.encode("utf-8", "replace")).digest()[:4]) < share * 2**32

        return (
            Examples([p for p in self.pairs if not held_out(p)], [g for g in self.graded if not held_out(g)]),
            Examples([p for p in self.pairs if held_out(p)], [g for g in self.graded if held_out(g)]),
        )


def read_examples(path: Path, columns: Columns | None = None) -> Examples:
    """The rows of a JSONL (``.gz``: gzipped), CSV or TSV file. Raises InputError that names each bad row by its line.

    With ``chosen`` and ``rejected`` they are pairs, as ``read_pairs`` takes them; else texts, each with a number (the
    higher, the better) or a label, of which ``columns.good`` names the better ones.
    """
    columns = columns or Columns()
    rows: list[tuple[int, dict[str, Any]]] = []
    wrong: list[str] = []
    for number, row in _rows(path):
        if isinstance(row, str):
            wrong.append(f"{path}, line {number}: {row}")
        else:
            rows.append((number, row))
    if not rows and not wrong:
        raise InputError(f"{path} holds no rows; give 'chosen' and 'rejected', or texts with a label or a grade")
    first = rows[0][1] if rows else {}
    found: list[Pair | Graded] = []
    as_pairs = not first or ("chosen" in first and "rejected" in first and columns.text is None)
    parse = pair_of if as_pairs else _grader(path, first, [row for _, row in rows], columns)
    for number, row in rows:
        try:
            found.append(parse(row))
        except ValueError as error:
            wrong.append(f"{path}, line {number}: {error}")
    if wrong:
        more = f"\nand {len(wrong) - _SHOWN} more bad rows" if len(wrong) > _SHOWN else ""
        raise InputError("\n".join(wrong[:_SHOWN]) + f"{more}\nrepair or remove these rows")
    examples = Examples(
        [row for row in found if isinstance(row, Pair)], [row for row in found if isinstance(row, Graded)]
    )
    if examples.graded and len({row.grade for row in examples.graded}) < 2:
        raise InputError(f"all rows of {path} have the same grade; give better and worse ones to learn from")
    return examples


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Line and row, or what is wrong with it."""
    name = path.name.removesuffix(".gz")
    if not name.endswith((".csv", ".tsv")):
        for number, line in enumerate(read_lines(path), 1):
            if line.strip():
                try:
                    yield number, parse_row(line)
                except ValueError as error:
                    yield number, str(error)
        return
    csv.field_size_limit(_CELL)
    text = "".join(read_lines(path))
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if name.endswith(".tsv") else ",")
    try:
        for row in reader:
            if None in row or None in row.values():
                yield reader.line_num, f"it has not the {len(reader.fieldnames or [])} columns of the first line"
            else:
                yield reader.line_num, dict(row)
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: {error}; repair it") from error


def _grader(path: Path, first: dict[str, Any], rows: Sequence[dict[str, Any]], columns: Columns) -> Any:
    """What turns a row into a graded text. Raises InputError when the columns cannot be told."""

    def choose(given: str | None, usual: Sequence[str], what: str, option: str) -> str:
        found = [given] if given is not None else [key for key in usual if key in first]
        if not found or found[0] not in first:
            asked = f"no column {given!r}" if given is not None else f"no column of {what}"
            raise InputError(
                f"{path} has {asked} (it has {', '.join(map(str, first)) or 'none'}); name it with {option}, or give "
                "'chosen' and 'rejected'"
            )
        return found[0]

    text = choose(columns.text, _TEXTS, "texts", "--text")
    label = choose(columns.label, [key for key in _LABELS if key != text], "labels or grades", "--label")
    if columns.prompt is not None:
        choose(columns.prompt, (), "prompts", "--prompt")
    prompt = columns.prompt or next((key for key in _PROMPTS if key in first and key not in (text, label)), None)
    labels = Counter(str(row.get(label)) for row in rows)
    good = set(columns.good)
    if good and not good <= set(labels):
        raise InputError(f"{path} has no label {min(good - set(labels))!r}; it has {_names(labels)}")
    if not good and any(_number(row.get(label)) is None for row in rows):
        wordy = sum(_number(row.get(label)) is None for row in rows)
        if wordy == len(rows):
            raise InputError(f"{path} has the labels {_names(labels)}; say with --good which are the better ones")

    def graded(row: dict[str, Any]) -> Graded:
        response = row.get(text)
        if not isinstance(response, str):
            raise ValueError(f"its {text!r} is not a text")
        value = float(str(row.get(label)) in good) if good else _number(row.get(label))
        if value is None:
            raise ValueError(f"its {label!r} is not a number: {str(row.get(label))[:40]!r}")
        asked = row.get(prompt) if prompt is not None else None
        return Graded(prompt_of(asked, str(prompt)) if asked is not None else "", response, value)

    return graded


def _names(labels: Counter[str]) -> str:
    shown = [f"{name!r} ({n})" for name, n in labels.most_common(_SHOWN)]
    return ", ".join(shown) + (f" and {len(labels) - _SHOWN} more" if len(labels) > _SHOWN else "")


def _number(value: object) -> float | None:
    """A finite number, also one written as text or as a truth value."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None
    return number if abs(number) < float("inf") else None


def _draw(graded: Sequence[Graded], rng: random.Random) -> list[Comparison]:
    """Each text against one of another grade: to the same prompt where there is one, else of about its length.

    Without that, length would often be the easiest thing to learn.
    """
    by_prompt: dict[str, list[Graded]] = defaultdict(list)
    for row in graded:
        by_prompt[prompt_text(row.prompt)].append(row)
    drawn = []
    for row in rng.sample(graded, len(graded)):
        same = by_prompt[prompt_text(row.prompt)]
        several = bool(prompt_text(row.prompt)) and any(other.grade != row.grade for other in same)
        pool = same if several else graded
        tried = [other for other in rng.choices(pool, k=4 * _TRIES) if other.grade != row.grade][:_TRIES]
        if not tried and several:
            tried = [other for other in same if other.grade != row.grade]
        if not tried:  # nearly all of the texts have this grade
            continue
        length = len(row.response)
        other = min(tried, key=lambda o: abs(len(o.response) - length))
        high, low = (row, other) if row.grade > other.grade else (other, row)
        drawn.append(Comparison((high.prompt, high.response), (low.prompt, low.response)))
    return drawn
