"""`aisp-local bench`: measurements that users run on their own machine."""

from __future__ import annotations

from pathlib import Path

import click


@click.group()
def bench() -> None:
    """Measure this machine."""


@bench.command()
@click.option("-m", "--model", type=click.Path(path_type=Path), multiple=True, help="A GGUF model as well.")
@click.option("--only", multiple=True, help="raw, methods, many, peers, growth or memory. Default: all.")
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True, help="Pairs a ratio is the median of.")
@click.option("--quick", is_flag=True, help="Small sizes and the shipped model alone: does it run?")
@click.option("--report", type=click.Path(path_type=Path), help="Also write the tables into this Markdown file.")
def speed(model: tuple[Path, ...], only: tuple[str, ...], repeats: int, quick: bool, report: Path | None) -> None:
    """Measure tokens a second against llama.cpp itself, methods against best-of-n, and what each size costs.

    Pairs run in turn in one process. On the shipped model and on one of random weights (134 million parameters),
    which is written into the folder for temporary files. The last line is one JSON object.

    \b
    Examples:
      aisp-local bench speed
      aisp-local bench speed --only raw -m model.gguf
    """
    from aisp_local import shipped
    from aisp_local.bench import speed as measure
    from aisp_local.bench import synthetic
    from aisp_local.errors import InputError
    from aisp_local.files import check_output
    from aisp_local.native import check_model_file

    unknown = sorted(set(only) - set(measure.ITEMS))
    if unknown:
        raise InputError(f"--only {unknown[0]} is unknown; use {', '.join(measure.ITEMS)}")
    for path in model:
        check_model_file(path)
    if report is not None:
        check_output(report)
    models = [shipped.model(), *([] if quick else [synthetic.cached(synthetic.Shape())]), *model]
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        click.echo(text)

    result = measure.run(models, only or measure.ITEMS, 1 if quick else repeats, quick, say)
    if report is not None:
        measure.write_report(report, "\n".join(said))
    click.echo(measure.as_json(result))
