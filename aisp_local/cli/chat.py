"""`aisp-local chat`: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from aisp_local.api import DEFAULT_EFFORT, EFFORT, check_search
from aisp_local.cli.help import ExamplesFirst
from aisp_local.cli.live import ProgressLine, Streamed, stop_on_interrupt
from aisp_local.cli.options import load, method_options, model_options, search_options
from aisp_local.errors import AispError, BindingError, CapacityError, InputError
from aisp_local.files import check_output, write_output
from aisp_local.types import Message, Result

if TYPE_CHECKING:
    from aisp_local.api import Aligner

HELP = f"""\
/help                     this text
/effort {"|".join(EFFORT):<17} rollouts an answer: {", ".join(map(str, EFFORT.values()))}
/why                      iterations and candidates of the last answer, with their scores
/base                     the unaligned answer to the last question
/save FILE                write the conversation to a text file
/clear                    forget the conversation
/quit                     leave (also Ctrl-D)
Ctrl-C while it searches  the best answer so far"""


@dataclass
class Settings:
    method: str
    max_tokens: int
    rows: int | None
    seed: int
    time_limit: float | None
    effort: str
    stream: bool = False
    options: dict[str, Any] = field(default_factory=dict)  # of the method


@dataclass
class Session:
    """The conversation and the commands that act on it."""

    aligner: Aligner
    settings: Settings
    messages: list[Message] = field(default_factory=list)
    last: Result | None = None

    def ask(self, text: str) -> None:
        """One turn: search, show, remember."""
        messages: list[Message] = [*self.messages, {"role": "user", "content": text}]
        line = Streamed() if self.settings.stream else ProgressLine()
        settings = self.settings
        try:
            with stop_on_interrupt() as stop:
                result = self._answer(messages, stop, line, settings)
        except KeyboardInterrupt:
            line.clear()
            click.echo("(interrupted before there was an answer)")
            return
        finally:
            line.clear()
        self.messages = [*messages, {"role": "assistant", "content": result.answer}]
        self.last = result
        if isinstance(line, Streamed):
            line.finish(result.answer.rstrip())
        else:
            click.echo(wrapped(result.answer.strip()))
        note = f"reward {result.reward:.2f}{_judge(result.judge)}, {result.rollouts} rollouts, {result.seconds:.1f} s"
        if result.status == "interrupted":
            note += ", interrupted: the best so far"
        click.echo(click.style(f"[{note}]", dim=True))

    def _answer(
        self,
        messages: list[Message],
        stop: Callable[[], bool],
        line: ProgressLine,
        settings: Settings,
    ) -> Result:
        while True:
            engine = self.aligner.engine
            # An answer cut short by a full context is worse than a forgotten turn.
            if len(messages) > 2 and engine.room(messages) < min(settings.max_tokens, engine.n_ctx // 2):
                self._forget(messages, line)
                continue
            try:
                return self.aligner.chat(
                    messages,
                    method=settings.method,
                    effort=settings.effort,
                    n=EFFORT[settings.effort] if settings.stream else settings.rows,
                    max_tokens=settings.max_tokens,
                    seed=settings.seed + len(messages),
                    time_limit=settings.time_limit,
                    stop=stop,
                    on_progress=line,
                    **settings.options,
                )
            except CapacityError:
                if len(messages) <= 2:
                    raise
                self._forget(messages, line)

    def _forget(self, messages: list[Message], line: ProgressLine) -> None:
        start = 1 if messages[0]["role"] == "system" else 0
        del messages[start : start + 2]
        line.clear()
        click.echo(click.style("[the oldest turn was forgotten: context is full]", dim=True))

    def command(self, text: str) -> bool:
        """Run a /command; False ends the conversation."""
        name, _, argument = text[1:].partition(" ")
        argument = argument.strip()
        if name in ("quit", "exit", "bye"):
            return False
        if name in ("help", "?"):
            click.echo(HELP)
        elif name == "effort":
            self._effort(argument)
        elif name == "why":
            self._why()
        elif name == "base":
            self._base()
        elif name == "save":
            self._save(argument)
        elif name == "clear":
            self.messages, self.last = [], None
            click.echo("the conversation is forgotten")
        else:
            click.echo(f"unknown command /{name}; /help lists the commands")
        return True

    def _effort(self, argument: str) -> None:
        if argument not in EFFORT:
            click.echo(f"effort is {self.settings.effort}; use /effort {'|'.join(EFFORT)}")
            return
        self.settings.effort = argument
        click.echo(f"effort {argument}: {EFFORT[argument]} rollouts an answer")

    def _why(self) -> None:
        if self.last is None:
            click.echo("nothing to explain yet: ask something first")
            return
        click.echo("iteration  rollouts   best   mean    ESS   |U|    KL  seconds")
        for s in self.last.iterations:
            ess = "    -" if s.ess is None else f"{s.ess:5.1f}"
            norm = "   -" if s.control_norm is None else f"{s.control_norm:4.1f}"
            kl = "   -" if s.kl is None else f"{s.kl:4.1f}"
            row = f"{s.iteration:9d}  {s.n:8d}  {s.best:5.2f}  {s.mean:5.2f}  {ess}  {norm}  {kl}  {s.seconds:7.2f}"
            click.echo(row if s.note is None else f"{row}  {s.note}")
        click.echo("best candidates:")
        best = self.last.candidates[:5]
        for candidate, shown in zip(best, told_apart([c.text for c in best]), strict=True):
            click.echo(f"  {candidate.reward:6.2f}  (iteration {candidate.iteration})  {shown}")
            if candidate.parts:
                click.echo("          " + ", ".join(f"{name} {score:.2f}" for name, score in candidate.parts.items()))

    def _base(self) -> None:
        if self.last is None:
            click.echo("nothing to compare yet: ask something first")
            return
        baseline = self.aligner.baseline(
            self.messages[:-1], max_tokens=self.settings.max_tokens, calibration=self.last.calibration
        )
        click.echo(wrapped(baseline.text.strip()))
        click.echo(
            click.style(
                f"[unaligned: reward {baseline.reward:.2f}; aligned: {self.last.reward:.2f}]",
                dim=True,
            )
        )

    def _save(self, argument: str) -> None:
        if not argument:
            click.echo("give a file: /save conversation.txt")
            return
        path = Path(argument).expanduser()
        check_output(path)
        names = {"user": "You", "assistant": "Model", "system": "System"}
        turns = [f"{names.get(m['role'], m['role'])}: {m['content'].strip()}" for m in self.messages]
        write_output(path, "\n\n".join(turns) + "\n")
        click.echo(f"saved to {path}")


@click.command(cls=ExamplesFirst)
@click.option(
    "--effort",
    type=click.Choice(list(EFFORT)),
    default=DEFAULT_EFFORT,
    show_default=True,
    help=f"Rollouts an answer: {', '.join(map(str, EFFORT.values()))}.",
)
@model_options
@search_options
def chat(
    effort: str,
    model: Path | None,
    lora: tuple[Path, ...],
    lora_scaled: tuple[tuple[Path, float], ...],
    reward: Path | None,
    judge: Path | None,
    n_gpu_layers: int | None,
    threads: int | None,
    method: str,
    strength: float | None,
    more: tuple[str, ...],
    max_tokens: int,
    rows: int | None,
    seed: int,
    stream: bool,
    time_limit: float | None,
) -> None:
    """Talk with a model whose answers are aligned while it speaks. /help lists the commands.

    \b
    Examples:
      aisp-local chat
      aisp-local chat -m model.gguf -r reward_folder --effort medium
    """
    options = method_options(method, strength, stream, more)
    check_search(method=method, budget=EFFORT[effort], n=rows, max_tokens=max_tokens, seed=seed, **options)
    aligner = load(model, lora, lora_scaled, reward, judge, n_gpu_layers, threads)
    session = Session(aligner, Settings(method, max_tokens, rows, seed, time_limit, effort, stream, options))
    judging = "" if aligner.judge is None else f", judged by {aligner.judge.name}"
    click.echo(f"{Path(aligner.model_name).name} with {aligner.reward.name}{judging}. /help for help.")
    while True:
        try:
            text = _read_line()
        except EOFError:
            click.echo()
            return
        except KeyboardInterrupt:
            click.echo("\n(/quit or Ctrl-D leaves)")
            continue
        if not text:
            continue
        try:
            if text.startswith("/"):
                if not session.command(text):
                    return
            else:
                session.ask(text)
        except KeyboardInterrupt:
            click.echo("(interrupted)")
        except BindingError:
            raise
        except AispError as error:
            click.echo(f"error: {error}", err=True)


def told_apart(texts: Sequence[str], width: int = 90) -> list[str]:
    """Each text on one line of at most so many characters, from where they begin to differ if that is far in."""
    lines = [" ".join(text.split()) for text in texts]
    common = len(os.path.commonprefix(lines)) if len(lines) > 1 else 0
    begin = lines[0].rfind(" ", 0, common) + 1 if common > width // 2 else 0
    shown = [("..." if begin else "") + line[begin:] for line in lines]
    return [line if len(line) <= width else line[: width - 3] + "..." for line in shown]


def _judge(score: float | None) -> str:
    return "" if score is None else f", judge {score:.2f}"


def wrapped(text: str) -> str:
    """The text with its long lines broken between words, where a terminal shows it."""
    if not sys.stdout.isatty():
        return text
    width = min(shutil.get_terminal_size().columns, 100)
    breaker = textwrap.TextWrapper(width, break_long_words=False, break_on_hyphens=False)
    return "\n".join(breaker.fill(line) if len(line) > width else line for line in text.split("\n"))


def _read_line() -> str:
    """One line from the user; raises EOFError at the end and InputError for bytes that are not UTF-8."""
    if sys.stdin is None:
        raise InputError("standard input is closed; a chat needs it")
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (history and editing in input())
        try:
            return input("> ").strip()
        except UnicodeDecodeError:
            click.echo("error: that line is not valid UTF-8; set the terminal to UTF-8", err=True)
            return ""
    data = sys.stdin.buffer.readline()
    if not data:
        raise EOFError
    try:
        return data.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise InputError("standard input is not valid UTF-8; convert it to UTF-8") from error
