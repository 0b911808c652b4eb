"""`aisp-local explain`: a search that was written down, as a page to read."""

from __future__ import annotations

from pathlib import Path

import click

from aisp_local.cli.help import ExamplesFirst
from aisp_local.cli.names import FILE
from aisp_local.errors import InputError
from aisp_local.files import check_output, write_output
from aisp_local.trace import Trace


@click.command(cls=ExamplesFirst)
@click.argument("file", type=FILE)
@click.option("-o", "--output", type=FILE, help="The report. Default: FILE with the ending .html.")
def explain(file: Path, output: Path | None) -> None:
    """Make a web page of a trace FILE that needs nothing else: plots, candidates, settings, times.

    \b
    Examples:
      aisp-local generate "Tell me a story about a fox." --judge judge --judge-all --trace fox.json
      aisp-local explain fox.json -o fox.html
    """
    path = file.with_suffix(".html") if output is None else output
    trace = Trace.load(file)
    if path.resolve() == file.resolve():
        raise InputError(f"{path} is the trace itself; give another file for the report with -o")
    check_output(path)
    from aisp_local.report import report

    write_output(path, report(trace))
    click.echo(f"wrote {path}", err=True)
