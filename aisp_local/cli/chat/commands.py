"""The /commands of a conversation: one function each, in a table that /help prints."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from aisp_local.cli.chat.compare import BASE, compare, keep
from aisp_local.cli.chat.conversation import Conversation, Turn, latest, messages, names, path_of
from aisp_local.cli.chat.layout import columns_left, told_apart, wrapped
from aisp_local.cli.chat.session import Session
from aisp_local.cli.chat.settings import words
from aisp_local.cli.output import dim
from aisp_local.controllers import method_names
from aisp_local.defaults import EFFORT
from aisp_local.errors import InputError
from aisp_local.files import read_text

Run = Callable[[Session, str], None]
Words = Callable[[Session, str], Sequence[str]]


class LeaveError(Exception):
    """The user wants to leave."""


@dataclass(frozen=True)
class Command:
    """``words``: what its argument may go on with, given the argument so far, for completion."""

    usage: str
    help: str
    run: Run
    words: Words


COMMANDS: dict[str, Command] = {}
_ALIASES = {"exit": "quit", "bye": "quit", "?": "help", "retry": "regenerate"}


def run(session: Session, text: str) -> None:
    """Run the command of a line that begins with "/". Raises LeaveError, InputError and its kinds."""
    typed, *rest = text[1:].split(maxsplit=1) or [""]
    name = _ALIASES.get(typed, typed)
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        advice = f"did you mean /{near[0]}?" if near else "/help lists the commands"
        raise InputError(f"unknown command /{name}; {advice}")
    COMMANDS[name].run(session, "".join(rest).strip())


def complete(session: Session, line: str) -> list[str]:
    """What the last word of the line may become."""
    name, space, argument = line.partition(" ")
    if not space:
        return [f"/{known} " for known in COMMANDS if name and f"/{known}".startswith(name)]
    command = COMMANDS.get(_ALIASES.get(name[1:], name[1:])) if name.startswith("/") else None
    if command is None:
        return []
    begin = max(argument.rfind(end) for end in " ,=") + 1
    return [word for word in command.words(session, argument) if word.startswith(argument[begin:])]


def _nothing(_session: Session, _argument: str) -> Sequence[str]:
    return ()


def _command(usage: str, help: str, words: Words = _nothing) -> Callable[[Run], Run]:
    def add(function: Run) -> Run:
        COMMANDS[usage.split()[0]] = Command(usage, help, function, words)
        return function

    return add


def _files(_session: Session, argument: str) -> Sequence[str]:
    if " " in argument:
        return ()
    path = Path(argument).expanduser()
    folder = path if argument.endswith("/") else path.parent
    shown = argument[: argument.rfind("/") + 1]
    try:
        return sorted(f"{shown}{found.name}{'/' if found.is_dir() else ''}" for found in folder.iterdir())
    except OSError:
        return ()


def _kept(_session: Session, _argument: str) -> Sequence[str]:
    return names()


def _settings(session: Session, argument: str) -> Sequence[str]:
    known = words(session.settings.method)
    name, space, _ = argument.partition(" ")
    return known.get(name, ()) if space else [f"{known_name} " for known_name in known]


def _ways(session: Session, _argument: str) -> Sequence[str]:
    return [*method_names(), BASE, *(f"{name}=" for name in words(session.settings.method) if name != "method")]


@_command("help", "this text")
def _help(_session: Session, _argument: str) -> None:
    rows = [(f"/{command.usage}", command.help) for command in COMMANDS.values()]
    rows += [
        ('"""', "begins and ends a block of lines, which is never a command"),
        ("\\ at the end", "the line goes on (or Alt-Enter); pasted lines stay together"),
        ("Ctrl-C", "while it searches: the best answer so far"),
    ]
    formatter = click.HelpFormatter(max_width=120)
    formatter.write_dl(rows)
    click.echo(formatter.getvalue(), nl=False)


@_command("regenerate [SEED]", "answer the last question again, with another seed")
def _regenerate(session: Session, argument: str) -> None:
    turn = session.last_turn()
    before = session.seed(len(session.turns) - 1) if turn.seed is None else turn.seed
    session.again(turn.question, before + 1 if not argument else _whole(argument, "/regenerate takes a seed"))


@_command("edit [TEXT]", "ask the last question in other words: TEXT, or what you write in $EDITOR")
def _edit(session: Session, argument: str) -> None:
    question = session.turns[-1].question if session.turns else ""
    text = argument or _written(question)
    if not text or text == question:
        click.echo("nothing was changed")
    elif session.turns:
        session.again(text, session.seed(len(session.turns) - 1))
    else:
        session.ask(text)


@_command("undo", "forget the last question and its answer")
def _undo(session: Session, _argument: str) -> None:
    turn = session.last_turn()
    session.turns.pop()
    session.forget_result()
    click.echo(f"forgotten: {told_apart([turn.question], 60)[0]}")


@_command("clear", "forget the conversation")
def _clear(session: Session, _argument: str) -> None:
    session.conversation.turns = []
    session.conversation.path = None
    session.forget_result()
    click.echo("the conversation is forgotten")


@_command("history", "the conversation so far, with rewards")
def _history(session: Session, _argument: str) -> None:
    if session.conversation.system:
        click.echo(wrapped(f"System: {session.conversation.system}\n"))
    for i, turn in enumerate(session.turns, 1):
        reward = "" if turn.reward is None else dim(f"  [reward {turn.reward:.2f}]")
        click.echo(f"{wrapped(f'{i}> {turn.question}')}\n{wrapped(turn.answer.strip())}{reward}")
    if not session.turns:
        click.echo("nothing was said yet")


@_command("why", "iterations and candidates of the last answer, with their scores")
def _why(session: Session, _argument: str) -> None:
    if session.last is None:
        raise InputError("nothing to explain yet: ask something first, or /regenerate")
    click.echo("iteration  rollouts   best   mean    ESS   |U|    KL  seconds")
    for s in session.last.iterations:
        ess = "    -" if s.ess is None else f"{s.ess:5.1f}"
        norm = "   -" if s.control_norm is None else f"{s.control_norm:4.1f}"
        kl = "   -" if s.kl is None else f"{s.kl:4.1f}"
        row = f"{s.iteration:9d}  {s.n:8d}  {s.best:5.2f}  {s.mean:5.2f}  {ess}  {norm}  {kl}  {s.seconds:7.2f}"
        click.echo(row if s.note is None else f"{row}  {s.note}")
    click.echo("best candidates that differ:")
    best = session.last.distinct(5)
    begins = [f"{candidate.reward:7.2f}  (iteration {candidate.iteration})  " for candidate in best]
    texts = told_apart([candidate.text for candidate in best], columns_left(max(map(len, begins))))
    for candidate, begin, shown in zip(best, begins, texts, strict=True):
        click.echo(begin + shown)
        if candidate.parts:
            click.echo("          " + ", ".join(f"{name} {score:.2f}" for name, score in candidate.parts.items()))


@_command("base", "the unaligned answer to the last question")
def _base(session: Session, _argument: str) -> None:
    aligned = session.last_turn().reward
    baseline = session.unaligned()
    click.echo(wrapped(baseline.text.strip()))
    beside = "" if aligned is None else f"; aligned: {aligned:.2f}"
    click.echo(dim(f"[unaligned: reward {baseline.reward:.2f}{beside}]"))


@_command("compare WAY [WAY...]", "answers to the last question side by side: methods, NAME=VALUE, or base", _ways)
def _compare(session: Session, argument: str) -> None:
    compare(session, argument.split())


@_command("keep N", "go on with an answer of the comparison")
def _keep(session: Session, argument: str) -> None:
    keep(session, argument)


@_command(f"effort [{'|'.join(EFFORT)}]", f"rollouts an answer: {', '.join(map(str, EFFORT.values()))}",
          lambda *_: list(EFFORT))  # fmt: skip
def _effort(session: Session, argument: str) -> None:
    if argument:
        session.settings = session.settings.changed("effort", argument)
    settings = session.settings
    what = f"effort {settings.effort}" if settings.budget is None else "budget"
    click.echo(f"{what}: {settings.rollouts} rollouts an answer")


@_command("set NAME VALUE", "change a setting, such as strength, max-tokens or method; VALUE default takes it back",
          _settings)  # fmt: skip
def _set(session: Session, argument: str) -> None:
    name, _, value = argument.replace("=", " ", 1).partition(" ")
    if not value.strip():
        raise InputError("say what is to be set: /set strength 0.7; /show lists the settings")
    session.settings = session.settings.changed(name, value.strip())
    click.echo("\n".join(session.settings.lines()))


@_command("system [TEXT|@FILE|-]", "the system prompt: show it, set it, or - for none")
def _system(session: Session, argument: str) -> None:
    if not argument:
        click.echo(session.conversation.system or "there is no system prompt")
        return
    session.conversation.system = "" if argument == "-" else text_or_file(argument)
    click.echo("no system prompt from now on" if argument == "-" else "this is the system prompt from now on")


@_command("show", "model, reward, system prompt and settings")
def _show(session: Session, _argument: str) -> None:
    aligner, conversation = session.aligner, session.conversation
    click.echo(f"model        {aligner.model_name}")
    click.echo(f"reward       {aligner.reward.name}")
    if aligner.judge is not None:
        click.echo(f"judge        {aligner.judge.name}")
    if conversation.system:
        click.echo(f"system       {told_apart([conversation.system], 60)[0]}")
    if conversation.path is not None:
        click.echo(f"kept in      {conversation.path}")
    context = aligner.engine.n_ctx
    used = context - aligner.engine.room(messages(conversation.system, session.turns, ""))
    click.echo(f"context      {used} of {context} tokens, {_turns(session.turns)}")
    click.echo("\n".join(session.settings.lines()))


@_command("file PATH [TEXT]", "ask TEXT about a text file", _files)
def _file(session: Session, argument: str) -> None:
    if not argument:
        raise InputError("name a file: /file notes.txt What is this about?")
    path, text = _first_word(argument)
    content = _text_of(Path(path).expanduser())
    session.ask(f"{text}\n\n{content}" if text else content)


@_command("save [NAME|FILE]", "keep the conversation; FILE.txt is for people to read", _files)
def _save(session: Session, argument: str) -> None:
    conversation = session.conversation
    if not argument and conversation.path is None:
        raise InputError("give a name or a file: /save fox, /save talk.json or /save talk.txt")
    conversation.settings = {**session.models, **session.settings.as_json()}
    path = path_of(argument) if argument else conversation.path
    assert path is not None
    conversation.save(path)
    click.echo(f"saved to {path}" + ("" if path.suffix == ".json" else " (text; FILE.json can be gone on with)"))


@_command("trace FILE", "write the search for the last answer to a file (see replay and explain)", _files)
def _trace(session: Session, argument: str) -> None:
    if session.last is None:
        raise InputError("nothing to write yet: ask something first, or /regenerate")
    if not argument:
        raise InputError("give a file: /trace fox.json")
    path = Path(argument).expanduser()
    session.aligner.trace(session.last).save(path)
    click.echo(f"saved to {path}")


@_command("resume [NAME|FILE]", "go on with a conversation that was kept: the latest, or this one", _kept)
def _resume(session: Session, argument: str) -> None:
    session.conversation = Conversation.load(path_of(argument) if argument else latest())
    session.forget_result()
    resumed(session)


@_command("quit", "leave (also Ctrl-D)")
def _quit(_session: Session, _argument: str) -> None:
    raise LeaveError


def resumed(session: Session) -> None:
    """Say what is gone on with."""
    turns = session.turns
    last = f", the last: {told_apart([turns[-1].question], 60)[0]}" if turns else ""
    click.echo(dim(f"[{_turns(turns)}{last}; /history shows all]"))


def _turns(turns: Sequence[Turn]) -> str:
    return f"{len(turns)} turn{'' if len(turns) == 1 else 's'}"


def text_or_file(argument: str) -> str:
    """The text itself, or what the file of ``@FILE`` holds. Raises InputError."""
    return _text_of(Path(argument[1:]).expanduser()) if argument.startswith("@") else argument


def _text_of(path: Path) -> str:
    """The text of a file. Raises InputError for what is none."""
    text = read_text(path).strip()
    if not text:
        raise InputError(f"{path} is empty; give a file with text")
    return text


def _first_word(argument: str) -> tuple[str, str]:
    """A path, quoted if it has spaces, and what follows it."""
    if argument[0] not in "'\"":
        path, _, rest = argument.partition(" ")
        return path, rest.strip()
    path, quote, rest = argument[1:].partition(argument[0])
    if not quote:
        raise InputError(f"the path {argument} has no closing quote")
    return path, rest.strip()


def _whole(text: str, what: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise InputError(f"{what}, not {text!r}") from error


def _written(text: str) -> str | None:
    """What the user makes of the text in an editor; None if it was not written."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise InputError("an editor needs a terminal; use /edit TEXT")
    try:
        edited = click.edit(text, extension=".txt")
    except click.ClickException as error:
        raise InputError(f"{error.message}; set EDITOR, or use /edit TEXT") from error
    return None if edited is None else edited.strip()
