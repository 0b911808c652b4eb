"""The classes of all commands: examples come first in their help."""

from __future__ import annotations

import inspect
import os
import re
from typing import Any

import click

_MARK = "\b\nExamples:\n"


def split_examples(text: str) -> tuple[str, str]:
    """A help text without its block of examples, and the block."""
    before, mark, rest = inspect.cleandoc(text).partition(_MARK)
    block, _, after = rest.partition("\n\n")
    return f"{before.strip()}\n\n{after.strip()}".strip(), block if mark else ""


class ExamplesFirst(click.Command):
    """A command whose help shows how it is used before anything else."""

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        text, examples = split_examples(self.help or "")
        if examples:
            with formatter.section("Examples"):
                for line in inspect.cleandoc(examples).splitlines():
                    formatter.write(f"{'':{formatter.current_indent}}{line}\n")
        whole, self.help = self.help, text
        try:
            super().format_help_text(ctx, formatter)
        finally:
            self.help = whole

    def get_short_help_str(self, limit: int = 45) -> str:
        """The first sentence, or as many of its clauses as there is room for."""
        whole, self.help = self.help, split_examples(self.help or "")[0]
        try:
            found, least = super().get_short_help_str(10_000), super().get_short_help_str(limit)
        finally:
            self.help = whole
        if len(found) <= limit:
            return found
        for marks in ("[:;] ", ", "):
            if ends := [end.start() for end in re.finditer(marks, found) if end.start() <= limit]:
                return found[: ends[-1]]
        return least


class Group(ExamplesFirst, click.Group):
    """A group of such commands."""

    command_class = ExamplesFirst
    group_class = type


def use_colour(context: click.Context) -> None:
    """No colours where NO_COLOR asks for none (https://no-color.org)."""
    if os.environ.get("NO_COLOR"):
        context.color = False


CONTEXT: dict[str, Any] = {"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 120}
"""Settings of the outermost command, which the others inherit. The width is the terminal's, up to this."""
