"""Search for the answers to many questions, some at a time, and keep each when it is there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aisp_local.cli.batch.answers import Answers
from aisp_local.cli.batch.questions import Question, read_questions
from aisp_local.cli.live import BatchLine
from aisp_local.defaults import check_search
from aisp_local.errors import CapacityError, InputError
from aisp_local.rewards.manifest import MANIFEST
from aisp_local.types import Result

if TYPE_CHECKING:
    from aisp_local.api import Aligner

DEFAULT_AT_ONCE = 4
"""Prompts whose rollouts are decoded together: so many are lost by a kill, and asked again."""

Form = Callable[[Result], dict[str, Any]]


@dataclass(frozen=True)
class Outcome:
    """Of how many questions there are answers, and which lines have errors. ``stopped``: some were not tried."""

    answered: int
    failed: list[int]
    stopped: bool


class Batch:
    """A file of prompts, to be answered in one way: ``search`` are arguments of Aligner.generate_many.

    ``about``, JSON, says what else an answer depends on (and what a steering is): others are not gone on with.
    Raises InputError for a file that cannot be read, with ``strict`` also for the first line that cannot be asked.
    """

    def __init__(
        self, source: Path, search: Mapping[str, Any], about: object, *, raw: bool, strict: bool, at_once: int | None
    ) -> None:
        if at_once is not None and at_once < 1:
            raise InputError(f"--at-once is {at_once}; it must be at least 1")
        self.source, self._search, self._about = source, search, about
        self._strict, self._at_once = strict, at_once
        self.questions = [self._checked(question) for question in read_questions(source, raw)]
        bad = next((q for q in self.questions if q.problem is not None), None)
        if strict and bad is not None:
            raise InputError(f"{source}, line {bad.line}: {bad.problem}")

    def run(
        self, aligner: Aligner, output: Path | None, form: Form, stop: Callable[[], bool], line: BatchLine
    ) -> Outcome:
        """Answer what the output file has no answers to. ``form``: an answer as JSON. ``stop``: see Outcome.

        Raises InputError for an output that has something else in it, and what ends all searches.
        """
        search = {name: value for name, value in self._search.items() if name != "steering"}
        how = _hash([self._about, aligner.engine.fingerprint, aligner.reward.name, str(search)])
        keys = {question.line: f"{question.hash}-{how}" for question in self.questions}
        answers = Answers(output, self.source, keys)
        with closing(answers):
            pending = [question for question in self.questions if question.line not in answers.done]
            line.begin(len(self.questions), len(answers.done), self._search["max_tokens"])
            answered, failed = len(answers.done), list[int]()
            for group in self._groups(pending):
                for question, found in zip(group, self._answers(aligner, group, stop, line), strict=True):
                    if isinstance(found, KeyboardInterrupt) or (
                        isinstance(found, Result) and found.status == "interrupted"
                    ):
                        continue  # not the answer that it would have been
                    entry: dict[str, Any] = {"line": question.line, "id": question.id, "key": keys[question.line]}
                    if isinstance(found, Result):
                        entry |= {"prompt": question.prompt, **form(found)}
                        answered += 1
                    else:
                        entry["error"] = {"type": type(found).__name__, "message": str(found)}
                        failed.append(question.line)
                    answers.add(question.line, entry)
                    line.ended(failed="error" in entry)
                if stop() or (self._strict and failed):
                    break
            answers.order()
        return Outcome(answered, failed, stopped=answered + len(failed) < len(self.questions))

    def _checked(self, question: Question) -> Question:
        """The question, refused where its own settings cannot be."""
        names = ("method", "budget", "n", "max_tokens", "seed")
        try:
            check_search(**{name: self._search[name] for name in names} | dict(question.own))
        except InputError as error:
            return replace(question, problem=str(error))
        return question

    def _groups(self, questions: list[Question]) -> Iterator[list[Question]]:
        """Neighbours with the same settings that are answered together; those with a problem cost nothing."""
        most = 1 if self._search["time_limit"] is not None else self._at_once or DEFAULT_AT_ONCE
        group: list[Question] = []
        for question in questions:
            asked = [one for one in group if one.problem is None]
            full = len(asked) == most or (asked and asked[0].own != question.own)
            if question.problem is None and full:
                yield group
                group = []
            group.append(question)
        if group:
            yield group

    def _answers(
        self, aligner: Aligner, group: list[Question], stop: Callable[[], bool], line: BatchLine
    ) -> list[Result | BaseException]:
        asked = [question for question in group if question.problem is None]
        found: Iterator[Result | BaseException] = iter(self._search_for(aligner, asked, stop, line))
        return [next(found) if q.problem is None else InputError(q.problem) for q in group]

    def _search_for(
        self, aligner: Aligner, asked: list[Question], stop: Callable[[], bool], line: BatchLine
    ) -> list[Result | BaseException]:
        """What ``generate`` would answer to each alone, or raise. Without memory for all, half of them at a time."""
        if not asked:
            return []
        try:
            return aligner.generate_many(
                [question.prompt for question in asked],
                prompt_indices=[0] * len(asked),
                stop=stop,
                on_progress=line,
                **dict(self._search) | dict(asked[0].own),
            )
        except KeyboardInterrupt as interrupt:
            return [interrupt for _ in asked]
        except CapacityError as error:
            if len(asked) == 1:
                return [error]
            if self._at_once is not None:
                raise
            half = len(asked) // 2
            parts = (asked[:half], asked[half:])
            return [found for part in parts for found in self._search_for(aligner, part, stop, line)]


def content(path: Path | None) -> str | None:
    """A hash of a file, or of what describes a folder, so that a reward that was changed is another one."""
    if path is None:
        return None
    file = path / MANIFEST if path.is_dir() else path
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else str(path)


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
