"""`aisp-local`: the group, its options, and how an error reaches the user."""

from __future__ import annotations

import sys
import traceback
import warnings
from pathlib import Path
from typing import Any, NoReturn

import click
from click.core import ParameterSource

from aisp_local.cli.help import CONTEXT, Group, use_colour
from aisp_local.cli.names import FILE
from aisp_local.cli.output import tame
from aisp_local.cli.settings import commands, name_variables, read, set_variable
from aisp_local.errors import AispError, InputError

_HELP = "aisp_local.help"  # whether a command's help is asked for

EXIT_CODES = """\b
Exit codes:
  0    an answer was given
  1    something failed while running; replay: the run was another one
  2    bad input: the message says what, where and what to do
  130  interrupted before there was any answer"""


class ErrorsAsSentences(Group):
    """Prints an error of ours as one sentence; ``--debug`` shows where it came from."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        ctx.meta[_HELP] = not set(CONTEXT["help_option_names"]).isdisjoint(args)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except AispError as error:
            self._fail(ctx, str(error), 2 if isinstance(error, InputError) else 1)
        except click.BadParameter as error:
            if isinstance(error.param, click.Option) and error.ctx is not None:
                source = error.ctx.get_parameter_source(str(error.param.name))
                if source == ParameterSource.ENVIRONMENT:
                    said = f"{error.message} It is set by the environment variable {set_variable(error.param)}."
                    raise click.BadParameter(said, error.ctx, error.param) from error
            raise
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
        click.echo(f"aisp-local: error: {tame(sentence)}", err=True)  # which may quote a server, or a file
        sys.exit(code)


def _version(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value and not context.resilient_parsing:
        from aisp_local.cli.version import lines

        click.echo("\n".join(lines()))
        context.exit()


@click.group(
    cls=ErrorsAsSentences,
    epilog=EXIT_CODES,
    context_settings=CONTEXT,
)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.option(
    "--config",
    type=FILE,
    envvar="AISP_CONFIG",
    help="File of settings. Default: what `config path` prints.",
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show versions and exit."
)
@click.pass_context
def main(context: click.Context, debug: bool, config: Path | None) -> None:
    """Align a local language model while it answers: offline, no fine-tuning.

    \b
    Examples:
      aisp-local chat
      aisp-local generate "Tell me a story about a fox." --budget 64
      aisp-local generate - --json -m model.gguf -r reward_folder < prompt.txt
    """
    if not debug:
        warnings.showwarning = _as_sentence
    use_colour(context)
    if context.invoked_subcommand in commands(main):
        try:
            context.default_map = read(main, config).defaults(main)
        except InputError as error:
            if context.meta[_HELP]:
                click.echo(f"aisp-local: {error}", err=True)
            elif context.invoked_subcommand != "doctor":  # which says itself what is wrong with the settings
                raise


def _as_sentence(message: Warning | str, *_: Any, **__: Any) -> None:
    click.echo(f"aisp-local: {message}", err=True)


def _add_commands() -> None:
    from aisp_local.cli.bench import bench
    from aisp_local.cli.chat import chat
    from aisp_local.cli.completion import completion
    from aisp_local.cli.config import config
    from aisp_local.cli.doctor import doctor
    from aisp_local.cli.explain import explain
    from aisp_local.cli.generate import generate
    from aisp_local.cli.models import models
    from aisp_local.cli.replay import replay
    from aisp_local.cli.reward import reward
    from aisp_local.cli.serve import serve

    main.add_command(bench)
    main.add_command(chat)
    main.add_command(completion)
    main.add_command(config)
    main.add_command(doctor)
    main.add_command(explain)
    main.add_command(generate)
    main.add_command(models)
    main.add_command(replay)
    main.add_command(reward)
    main.add_command(serve)
    name_variables(main)


_add_commands()
