"""A conversation that goes on: what is asked is searched for, shown and remembered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from aisp_local.cli.chat.conversation import Conversation, Turn, messages
from aisp_local.cli.chat.layout import wrapped
from aisp_local.cli.chat.settings import Settings
from aisp_local.cli.live import ProgressLine, Streamed, stop_on_interrupt
from aisp_local.cli.output import dim, print_answer
from aisp_local.errors import CapacityError, InputError
from aisp_local.grammar import Grammar
from aisp_local.steering import Steering
from aisp_local.types import Baseline, Result

if TYPE_CHECKING:
    from aisp_local.api import Aligner


@dataclass
class Session:
    """``models``: options of the command that named them, to be kept with the conversation.

    ``steering``: what a search starts with.
    ``last`` is the result of the last turn, None where that was read from a file or is another one now; ``compared``:
    the answers of a comparison since.
    """

    aligner: Aligner
    settings: Settings
    conversation: Conversation = field(default_factory=Conversation)
    models: Mapping[str, Any] = field(default_factory=dict)
    grammar: Grammar | None = None
    steering: Steering | None = None
    last: Result | None = None
    compared: list[Turn] = field(default_factory=list)
    _forgotten: int = 0

    @property
    def turns(self) -> list[Turn]:
        return self.conversation.turns

    def ask(self, question: str, alone: bool = False) -> None:
        """One more turn. ``alone``: for a program, which is shown the answer and nothing else.

        Raises KeyboardInterrupt where there is no answer yet, and nothing is remembered.
        """
        self._turn(self.turns, question, self.seed(len(self.turns)), alone)

    def again(self, question: str, seed: int) -> None:
        """The last turn in another way; it stays where there is no answer."""
        self._turn(self.turns[:-1], question, seed)

    def seed(self, turn: int) -> int:
        """That of the turn, from 0, when it is first asked."""
        return self.settings.seed + 2 * turn + 1

    def forget_result(self) -> None:
        """What is known of the last turn beyond its text: it is another one now."""
        self.last, self.compared = None, []
        self._forgotten = min(self._forgotten, len(self.turns))

    def last_turn(self) -> Turn:
        """Raises InputError where nothing was asked."""
        if not self.turns:
            raise InputError("nothing was asked yet; ask something first")
        return self.turns[-1]

    def search(self, turns: Sequence[Turn], question: str, settings: Settings, seed: int, line: ProgressLine) -> Result:
        """An answer to the question after these turns. Raises KeyboardInterrupt where there is none yet."""
        try:
            with stop_on_interrupt() as stop:
                skip = self._skipped(turns, question, settings)
                while True:
                    asked = messages(self.conversation.system, turns[skip:], question)
                    try:
                        return self.aligner.chat(
                            asked, seed=seed, grammar=self.grammar, steering=self._start(turns, settings), stop=stop,
                            on_progress=line, **settings.search(),
                        )  # fmt: skip
                    except CapacityError as error:
                        if skip == len(turns):
                            raise self._too_long(error) from error
                        skip += 1
                        self._forget(skip)
        finally:
            line.clear()

    def _start(self, before: Sequence[Turn], settings: Settings) -> Steering | None:
        """The control that a search after these turns starts with; None for a method that holds none."""
        if not settings.holds:
            return None
        learnt = before[-1].learnt if before and settings.warm_start else None
        if learnt is None:
            return self.steering
        u, nats = learnt
        return Steering(u, self.aligner.engine.fingerprint, nats=nats)

    def unaligned(self) -> Baseline:
        """The greedy answer of the model alone to the last question."""
        *before, turn = self.turns
        asked = messages(
            self.conversation.system, before[self._skipped(before, turn.question, self.settings) :], turn.question
        )
        calibration = None if self.last is None else self.last.calibration
        return self.aligner.baseline(
            asked, max_tokens=self.settings.max_tokens, grammar=self.grammar, calibration=calibration
        )

    def _skipped(self, turns: Sequence[Turn], question: str, settings: Settings) -> int:
        """How many turns the model cannot read, oldest first: an answer cut short is worse than a forgotten turn."""
        engine = self.aligner.engine
        enough, skip = min(settings.max_tokens, engine.n_ctx // 2), 0
        while skip < len(turns) and engine.room(messages(self.conversation.system, turns[skip:], question)) < enough:
            skip += 1
        self._forget(skip)
        return skip

    def _forget(self, skip: int) -> None:
        if skip > self._forgotten:
            click.echo(dim("[the oldest turn was forgotten: context is full; /clear begins anew]"))
        self._forgotten = skip

    def _too_long(self, error: CapacityError) -> CapacityError:
        system = self.conversation.system
        return CapacityError(f"{error}, or the system prompt (/system), which is part of it") if system else error

    def _turn(self, before: Sequence[Turn], question: str, seed: int, alone: bool = False) -> None:
        line = (Streamed if self.settings.stream else ProgressLine)(max_tokens=self.settings.max_tokens)
        result = self.search(before, question, self.settings, seed, line)
        self.conversation.turns = [*before, Turn.of(question, result, self.settings.as_json())]
        self.last, self.compared = result, []
        if isinstance(line, Streamed):
            line.finish(result.answer.rstrip())
        else:
            print_answer(wrapped(result.answer.strip()))
        if not alone:
            click.echo(dim(f"[{note(result)}]"))


def note(result: Result) -> str:
    """What a person wants to know of a search in a few words."""
    judge = "" if result.judge is None else f", judge {result.judge:.2f}"
    shown = f"reward {result.reward:.2f}{judge}, {result.rollouts} rollouts, {result.seconds:.1f} s"
    if result.status == "incomplete":
        return f"{shown}, none was complete under the grammar"
    return f"{shown}, interrupted: the best so far" if result.status == "interrupted" else shown
