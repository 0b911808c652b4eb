"""/compare: the last question answered in several ways, side by side."""

from __future__ import annotations

import click

from aisp_local.cli.chat.conversation import Turn
from aisp_local.cli.chat.layout import columns
from aisp_local.cli.chat.session import Session, note
from aisp_local.cli.chat.settings import Settings
from aisp_local.cli.live import ProgressLine
from aisp_local.cli.output import dim
from aisp_local.errors import InputError

BASE = "base"
"""In the place of a method: the unaligned greedy answer."""


def compare(session: Session, ways: list[str]) -> None:
    """Show the answers of these ways to the last question, and remember them for ``keep``.

    A way is what Settings.varied takes, or "base"; one alone is compared with the settings as they are.
    Raises InputError for a way that is none, and where nothing was asked.
    """
    last = session.last_turn()
    if not ways:
        raise InputError("say what with what: /compare best-of-n score, or /compare strength=0.2 strength=0.8")
    settings = {way: session.settings if way == BASE else session.settings.varied(way) for way in ways}
    if len(ways) == 1:
        settings = {_now(session.settings): session.settings} | settings
    if len(settings) == 1:
        raise InputError("these are the same; name two ways that differ")
    turns, texts = [], []
    for i, (way, chosen) in enumerate(settings.items(), 1):
        turn, about = _unaligned(session, last) if way == BASE else _searched(session, last, chosen)
        turns.append(turn)
        texts.append(f"{i}. {way}\n[{about}]\n\n{turn.answer.strip()}")
    session.compared = turns
    click.echo(columns(texts))
    click.echo(dim("[/keep N goes on with one of them]"))


def keep(session: Session, number: str) -> None:
    """The last turn becomes that of the comparison. Raises InputError for a number that it has not."""
    n = len(session.compared)
    if not n:
        raise InputError("nothing was compared since the last answer; see /compare")
    if number not in map(str, range(1, n + 1)):
        raise InputError(f"/keep takes the number of an answer, 1 to {n}")
    session.turns[-1] = session.compared[int(number) - 1]
    session.forget_result()
    click.echo(f"answer {number} is the conversation's now")


def _now(settings: Settings) -> str:
    strength = settings.options.get("strength")
    return settings.method if strength is None else f"{settings.method},strength={strength}"


def _searched(session: Session, last: Turn, settings: Settings) -> tuple[Turn, str]:
    seed = session.seed(len(session.turns) - 1) if last.seed is None else last.seed
    line = ProgressLine(max_tokens=settings.max_tokens)
    result = session.search(session.turns[:-1], last.question, settings, seed, line)
    return Turn.of(last.question, result, settings.as_json()), note(result)


def _unaligned(session: Session, last: Turn) -> tuple[Turn, str]:
    baseline = session.unaligned()
    return Turn(last.question, baseline.text, {"reward": baseline.reward}), f"unaligned: reward {baseline.reward:.2f}"
