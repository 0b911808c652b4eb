"""`aisp-local`: the group, its options, and how an error reaches the user."""

from __future__ import annotations

import sys
import traceback
import warnings
from typing import Any, NoReturn

import click

from aisp_local.cli.help import CONTEXT, Group
from aisp_local.errors import AispError, InputError

EXIT_CODES = """\b
Exit codes:
  0    an answer was given
  1    something failed while running
  2    bad input: the message says what, where and what to do
  130  interrupted before there was any answer"""


class ErrorsAsSentences(Group):
    """Prints an error of ours as one sentence; ``--debug`` shows where it came from."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except AispError as error:
            self._fail(ctx, str(error), 2 if isinstance(error, InputError) else 1)
        except OSError as error:
            if error.filename is None:  # a closed pipe, which click knows
                raise
            self._fail(ctx, f"{error.filename} cannot be used ({error.strerror}); give another path", 2)
        except KeyboardInterrupt:
            click.echo("aisp-local: interrupted", err=True)
            sys.exit(130)

    @staticmethod
    def _fail(ctx: click.Context, sentence: str, code: int) -> NoReturn:
        if ctx.params.get("debug"):
            traceback.print_exc()
        click.echo(f"aisp-local: error: {sentence}", err=True)
        sys.exit(code)


@click.group(
    cls=ErrorsAsSentences,
    epilog=EXIT_CODES,
    context_settings=CONTEXT,
)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.version_option(package_name="aisp-local")
def main(debug: bool) -> None:
    """Align a local language model while it answers: offline, no fine-tuning.

    \b
    Examples:
      aisp-local chat
      aisp-local generate "Tell me a story about a fox." --budget 64
      aisp-local generate - --json -m model.gguf -r reward_folder < prompt.txt
    """
    if not debug:
        warnings.showwarning = _as_sentence


def _as_sentence(message: Warning | str, *_: Any, **__: Any) -> None:
    click.echo(f"aisp-local: {message}", err=True)


def _add_commands() -> None:
    from aisp_local.cli.bench import bench
    from aisp_local.cli.chat import chat
    from aisp_local.cli.generate import generate
    from aisp_local.cli.models import models
    from aisp_local.cli.reward import reward
    from aisp_local.cli.serve import serve

    main.add_command(bench)
    main.add_command(chat)
    main.add_command(generate)
    main.add_command(models)
    main.add_command(reward)
    main.add_command(serve)


_add_commands()
