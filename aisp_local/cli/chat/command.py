"""`aisp-local chat`: its options, and the loop that reads and answers."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from aisp_local.cli.chat import commands
from aisp_local.cli.chat.conversation import Conversation, latest, messages, path_of
from aisp_local.cli.chat.conversation import names as conversations
from aisp_local.cli.chat.lines import Entry, Lines
from aisp_local.cli.chat.persona import load_persona, personas
from aisp_local.cli.chat.session import Session
from aisp_local.cli.chat.settings import Settings
from aisp_local.cli.help import ExamplesFirst
from aisp_local.cli.input import standard_input
from aisp_local.cli.names import completing
from aisp_local.cli.options import (
    budget_options,
    load,
    method_options,
    model_options,
    read_grammar,
    say_where_from,
    search_options,
    settable,
    typed,
)
from aisp_local.defaults import layered
from aisp_local.errors import AispError, BindingError, InputError
from aisp_local.steering import Steering

_LATEST = " "
"""What --resume alone stands for, which no name is."""


@click.command(cls=ExamplesFirst)
@click.argument("question", required=False)
@click.option(
    "--persona",
    metavar="NAME|FILE",
    shell_complete=completing(lambda: sorted(personas())),
    help="A system prompt, a reward and settings that go together (TOML).",
)
@click.option(
    "--resume",
    is_flag=False,
    flag_value=_LATEST,
    metavar="[NAME|FILE]",
    shell_complete=completing(conversations),
    help="Go on with a conversation that /save kept: the latest, or this one.",
)
@click.option("--system", metavar="TEXT|@FILE", help="The system prompt.")
@click.option("--warm-start/--no-warm-start", help="Start each turn with what the turn before learnt.")
@budget_options
@model_options
@search_options
@click.pass_context
def chat(context: click.Context, /, question: str | None, persona: str | None, resume: str | None, **_: Any) -> None:
    """Talk with a model whose answers are aligned while it speaks. /help lists the commands.

    With QUESTION and standard input from a file or a pipe, answer that one question about what comes in.

    \b
    Examples:
      aisp-local chat
      aisp-local chat -m model.gguf -r reward_folder --effort medium
      aisp-local chat --persona storyteller-kind
      aisp-local chat --resume
      aisp-local chat "Go on with this story:" < story.txt
    """
    if question is not None and not question.strip():
        raise InputError("the question is empty; ask something, or leave it out to talk")
    conversation = Conversation()
    if resume is not None:
        conversation = Conversation.load(latest() if resume == _LATEST else path_of(resume))
    resumed = {**conversation.settings, "system": conversation.system} if conversation.system else conversation.settings
    said = _said(context, resumed, load_persona(persona) if persona is not None else {})
    conversation.system = said["system"] or ""
    settings = _settings(said)
    grammar = read_grammar(said["grammar_file"], said["json_schema"])
    steering = None if said["steering"] is None else Steering.load(said["steering"])
    for name, given in (("steering", steering is not None), ("warm-start", said["warm_start"])):
        if given and not settings.holds and typed(name.replace("-", "_")):
            raise InputError(f"--{name} needs a method that holds a control: score, with a strength above 0")
    piped = None if question is None or (sys.stdin is not None and sys.stdin.isatty()) else _piped()
    names = ("model", "lora", "lora_scaled", "reward", "judge")
    aligner = load(**{name: said[name] for name in (*names, "n_gpu_layers", "threads")})
    aligner.engine.room(messages(conversation.system, (), "Hello"))  # the chat template takes it, or says why not
    kept = {name: kept for name in names if (kept := _kept(said[name]))}
    if steering is not None:
        aligner.check_steering(steering)
    say_where_from(steering, aligner)
    session = Session(aligner, settings, conversation, kept, grammar, steering)
    if question is not None and piped is not None:
        session.ask(f"{question}\n\n{piped}" if piped else question, alone=not sys.stdout.isatty())
        return
    lines = Lines(lambda line: commands.complete(session, line))
    if lines.terminal:
        judging = "" if aligner.judge is None else f", judged by {aligner.judge.name}"
        click.echo(f"{Path(aligner.model_name).name} with {aligner.reward.name}{judging}. /help for help.")
    if resume is not None:
        commands.resumed(session)
    _talk(session, lines, question)


def _talk(session: Session, lines: Lines, question: str | None) -> None:
    """Answer what is entered, ``question`` first, until the user leaves."""
    entry = None if question is None else Entry(question, command=False)
    while True:
        try:
            entry = entry or lines.read()
        except EOFError:
            click.echo()
            return
        except KeyboardInterrupt:
            click.echo("\n(/quit or Ctrl-D leaves)")
            continue
        except InputError as error:
            if not lines.terminal:
                raise
            click.echo(f"error: {error}", err=True)
            continue
        try:
            if entry.command:
                commands.run(session, entry.text)
            elif entry.text.strip():
                session.ask(entry.text)
        except commands.LeaveError:
            return
        except KeyboardInterrupt:
            click.echo("(interrupted)")
        except BindingError:
            raise
        except AispError as error:
            click.echo(f"error: {error}", err=True)
        entry = None


def _said(context: click.Context, resumed: Mapping[str, Any], persona: Mapping[str, Any]) -> dict[str, Any]:
    """The options: those of the command line, else those of the persona, else of the conversation, else as always.

    A file's options of the method hold for that method alone.
    """
    system = context.params["system"]
    params = context.params | {"system": None if system is None else commands.text_or_file(system)}
    given = {name: value for name, value in params.items() if typed(name)}
    said = layered(params, resumed, persona, given)
    said.setdefault("budget", None)
    method, known = said["method"], settable(said["method"])
    layers: list[Mapping[str, Any]] = [{"strength": params["strength"]}]
    layers += [method_options(method, None, False, params["more"])]
    for file in (resumed, persona):
        layers += [file.get("options", {}), {"strength": file["strength"]} if "strength" in file else {}]
    options = {name: value for layer in layers for name, value in layer.items() if name in known and value is not None}
    said["options"] = options | method_options(method, given.get("strength"), False, given.get("more", ()))
    return said


def _settings(said: Mapping[str, Any]) -> Settings:
    return Settings(**{field.name: said[field.name] for field in fields(Settings)})


def _kept(value: Any) -> Any:
    """A file that was named, as JSON that finds it from everywhere; the name of what is no file stays one."""
    if isinstance(value, Path):
        return str(value.resolve()) if value.exists() else str(value)
    return [_kept(one) for one in value] if isinstance(value, tuple) else value


def _piped() -> str:
    return "" if sys.stdin is None else standard_input("").strip()
