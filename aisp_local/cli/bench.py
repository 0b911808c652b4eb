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
@click.option(
    "--repeats", type=click.IntRange(1), help="Pairs a ratio is the median of. Default: 5, and 1 with --quick."
)
@click.option("--quick", is_flag=True, help="Small sizes and the shipped model alone: does it run?")
@click.option("--report", type=click.Path(path_type=Path), help="Also write the tables into this Markdown file.")
def speed(
    model: tuple[Path, ...], only: tuple[str, ...], repeats: int | None, quick: bool, report: Path | None
) -> None:
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

    result = measure.run(models, only or measure.ITEMS, repeats or (1 if quick else 5), quick, say)
    if report is not None:
        measure.write_report(report, "\n".join(said))
    click.echo(measure.as_json(result))


@bench.command()
@click.option("-m", "--model", type=click.Path(path_type=Path), help="GGUF model. Default: the shipped pairs.")
@click.option("-r", "--reward", type=click.Path(path_type=Path), help="What rewards its answers.")
@click.option("--prompts", type=click.Path(path_type=Path), help="JSON file of two lists, tuning and evaluation.")
@click.option("--pair", "pairs", multiple=True, help="One of the shipped pairs. Default: all of them.")
@click.option("--method", "methods", multiple=True, help="Label of a row. Default: all. best-of-n is always there.")
@click.option("--budget", "budgets", type=click.IntRange(1), multiple=True, help="Rollouts. Default: 32, 64 and 256.")
@click.option("--max-prompts", type=click.IntRange(1), help="At most so many prompts of each list.")
@click.option("--max-tokens", type=click.IntRange(1), default=96, show_default=True)
@click.option("--exact-kl", type=click.IntRange(0), default=4, show_default=True, help="Prompts whose KL is exact.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--threads", type=int, help="CPU threads for decoding.")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder of runs and report.")
def controllers(
    model: Path | None,
    reward: Path | None,
    prompts: Path | None,
    pairs: tuple[str, ...],
    methods: tuple[str, ...],
    budgets: tuple[int, ...],
    max_prompts: int | None,
    max_tokens: int,
    exact_kl: int,
    seed: int,
    threads: int | None,
    out: Path,
) -> None:
    """Compare alignment methods at equal numbers of rollouts, each with its knob tuned on prompts of their own.

    Runs are kept in OUT as they come: the same command goes on where it was stopped. report.md and report.json say what
    was found, with 95% intervals over prompts.

    \b
    Examples:
      aisp-local bench controllers -o contest
      aisp-local bench controllers -o mine -m model.gguf -r my_reward --prompts prompts.json
    """
    from aisp_local.bench import contest_run

    chosen = contest_run.chosen_pairs(model, reward, prompts, pairs, max_prompts, max_tokens)
    entries = contest_run.chosen_entries(methods)
    contest_run.run(
        chosen,
        entries,
        out,
        budgets=sorted(set(budgets)) or [32, 64, 256],
        exact_kl=exact_kl,
        seed=seed,
        threads=threads,
        say=lambda line: click.echo(line, err=True),
        show=click.echo,
    )
