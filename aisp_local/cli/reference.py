"""The reference of the command line as Markdown: python -m aisp_local.cli.reference > docs/cli.md"""

from __future__ import annotations

import os
from collections.abc import Iterator

import click

from aisp_local.cli.main import main

_WIDTH = 100
_HEAD = """\
# The command line

Made by `python -m aisp_local.cli.reference > docs/cli.md`: change the commands, not this page.
Without settings of yours; `--help` shows the values that are in effect.
"""


def commands(command: click.Command, context: click.Context) -> Iterator[tuple[str, str]]:
    """Every command's full name and its help, parents first."""
    yield context.command_path, command.get_help(context)
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            yield from commands(inner, click.Context(inner, info_name=name, parent=context))


def reference() -> str:
    """The whole page, the same whatever the terminal and the settings are."""
    context = click.Context(main, info_name="aisp-local", terminal_width=_WIDTH, **main.context_settings)
    found = list(commands(main, context))
    parts = [_HEAD, "\n".join(f"- [`{name}`](#{name.replace(' ', '-')})" for name, _ in found)]
    for name, text in found:
        parts.append(f"## {name}\n\n```\n{text.rstrip()}\n```")
    return "\n\n".join(part.strip() for part in parts) + "\n"


if __name__ == "__main__":
    for variable in [name for name in os.environ if name.startswith("AISP_")]:
        del os.environ[variable]
    print(reference(), end="")
