"""`aisp-local reward score`"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from aisp_local.cli.help import ExamplesFirst
from aisp_local.cli.names import FILE
from aisp_local.cli.output import print_json
from aisp_local.cli.reward.common import FOLDER, load_measured

if TYPE_CHECKING:
    from aisp_local.reward_kit.rows import Row

_AT_ONCE = 64  # rows of a file; what comes through a pipe is scored line by line


@click.command(cls=ExamplesFirst)
@click.argument("folder", type=FOLDER)
@click.argument("texts", nargs=-1)
@click.option("-p", "--prompt", default="", help="What the responses answer, where a row has no prompt of its own.")
@click.option("-i", "--input", "input_", type=FILE, help="Read this file (.gz: gzipped; -: standard input).")
@click.option(
    "--format",
    "format_",
    type=click.Choice(["auto", "jsonl", "text"]),
    default="auto",
    show_default=True,
    help="What the input's lines are; auto looks at the first.",
)
@click.option("--json", "json_", is_flag=True, help="Print a JSON object a line.")
def score(folder: Path, texts: tuple[str, ...], prompt: str, input_: Path | None, format_: str, json_: bool) -> None:
    """Score TEXTS, or the lines of a file or of standard input, with the reward in FOLDER.

    Prints one score a line, in order, as soon as it is known. JSON lines have 'response' ('responses', a list, or
    'answer', as `generate --input` writes it) and 'prompt', text or messages; other lines are a response each. Blank
    lines are skipped; --json tells each one's line.

    \b
    Examples:
      aisp-local reward score my_reward -p "Tell me a story." "Once upon a time." "Go away."
      aisp-local reward score my_reward -i answers.jsonl --json
      generator | aisp-local reward score my_reward
    """
    from aisp_local.cli.output import print_answer
    from aisp_local.errors import InputError
    from aisp_local.jsonl import read_lines
    from aisp_local.reward_kit.rows import Row, read_rows, score_rows

    if texts and input_ is not None:
        raise InputError("both texts and --input were given; give one of them")
    rows: Iterator[Row]
    at_once = _AT_ONCE
    if texts:
        rows = (Row(1, i, prompt, text) for i, text in enumerate(texts, 1))
    else:
        json_lines = None if format_ == "auto" else format_ == "jsonl"
        if input_ is None or str(input_) == "-":
            if sys.stdin is None:
                raise InputError("standard input is closed; give texts, or a file with --input")
            name, lines = "standard input", _standard_input()
            at_once = _AT_ONCE if stat.S_ISREG(os.fstat(sys.stdin.fileno()).st_mode) else 1
        else:
            name, lines = str(input_), read_lines(input_)
        rows = read_rows(lines, name, prompt, json_lines=json_lines)
    reward = load_measured(folder)
    for row, value in score_rows(reward, rows, at_once):
        if json_:
            print_json({"line": row.line, "index": row.index, "response": row.response, "score": value}, None)
        else:
            print_answer(f"{value:.6g}")


def _standard_input() -> Iterator[str]:
    from aisp_local.errors import InputError

    for number, line in enumerate(iter(sys.stdin.buffer.readline, b""), 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"standard input, line {number}: it is not valid UTF-8; convert it to UTF-8") from error
