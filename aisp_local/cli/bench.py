"""`aisp-local bench`: measurements that users run on their own machine."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from aisp_local.cli.help import Group
from aisp_local.cli.names import FILE, MODEL

F = TypeVar("F", bound=Callable[..., Any])
BUDGETS = [32, 64, 256]


@click.group(cls=Group)
def bench() -> None:
    """Measure this machine.

    \b
    Examples:
      aisp-local bench speed
      aisp-local bench quality -o quality
    """


@bench.command()
@click.option("-m", "--model", type=MODEL, multiple=True, help="A GGUF model as well.")
@click.option(
    "--only", multiple=True, help="raw, methods, many, peers, growth or memory; several with commas. Default: all."
)
@click.option(
    "--repeats", type=click.IntRange(1), help="Pairs a ratio is the median of. Default: 5, and 1 with --quick."
)
@click.option("--quick", is_flag=True, help="Small sizes and the shipped model alone: does it run?")
@click.option("--report", type=FILE, help="Also write the tables into this Markdown file.")
def speed(
    model: tuple[Path, ...], only: tuple[str, ...], repeats: int | None, quick: bool, report: Path | None
) -> None:
    """Measure tokens a second against llama.cpp itself, methods against best-of-n, and what each size costs.

    Pairs run in turn in one process. On the shipped model and on one of random weights (134 million parameters),
    which is written into the folder for temporary files. The last line is one JSON object.

    \b
    Examples:
      aisp-local bench speed
      aisp-local bench speed --only raw,methods -m model.gguf
    """
    from aisp_local import shipped
    from aisp_local.bench import speed as measure
    from aisp_local.bench import synthetic
    from aisp_local.errors import InputError
    from aisp_local.files import check_output
    from aisp_local.native import check_model_file

    items = [item for part in only for item in part.split(",")]
    unknown = sorted(set(items) - set(measure.ITEMS))
    if unknown:
        raise InputError(f"--only {unknown[0]} is unknown; use {', '.join(measure.ITEMS)}")
    for path in model:
        check_model_file(path)
    if report is not None:
        check_output(report)
        measure.check_report(report)
    models = [shipped.model(), *([] if quick else [synthetic.cached(synthetic.Shape())]), *model]
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        click.echo(text)

    result = measure.run(models, items or measure.ITEMS, repeats or (1 if quick else 5), quick, say)
    if report is not None:
        measure.write_report(report, "\n".join(said))
    click.echo(measure.as_json(result))


def again() -> str:
    """The line that runs this command again, with what it was told otherwise than by default; no folder is named."""
    context = click.get_current_context()
    words = ["aisp-local", *context.command_path.split()[1:], "-o", "results"]
    for option in context.command.params:
        value = context.params[str(option.name)]
        if option.name in ("out", "threads") or value in (None, (), option.get_default(context)):
            continue
        for one in value if isinstance(value, tuple) else (value,):
            words += [option.opts[0], one.name if isinstance(one, Path) else str(one)]
    return shlex.join(words)


def contest_options(command: F) -> F:
    """What all comparisons of methods ask."""
    for option in (
        click.option("-o", "--out", type=FILE, required=True, help="Folder of runs and report."),
        click.option("--threads", type=int, help="CPU threads for decoding."),
        click.option("--seed", type=click.IntRange(0), default=0, show_default=True),
        click.option(
            "--exact-kl",
            type=click.IntRange(0),
            default=4,
            show_default=True,
            help="Prompts of which the KL is exact, in the second iteration and in the last.",
        ),
        click.option("--max-tokens", type=click.IntRange(1), default=96, show_default=True),
        click.option("--max-prompts", type=click.IntRange(1), help="At most so many prompts of each list."),
        click.option(
            "--budget", "budgets", type=click.IntRange(1), multiple=True, help="Rollouts. Default: 32, 64 and 256."
        ),
        click.option("--method", "methods", multiple=True, help="Label of a row; best-of-n is always there."),
        click.option("--pair", "pairs", multiple=True, help="One of the shipped pairs."),
        click.option("--prompts", type=FILE, help="JSON file of two lists, tuning and evaluation."),
        click.option("--judge", type=FILE, help="With -m and -r: another reward, which no search sees."),
        click.option("-r", "--reward", type=FILE, help="What rewards its answers."),
        click.option("-m", "--model", type=MODEL, help="GGUF model. Default: the shipped pairs."),
    ):
        command = option(command)
    return command


@bench.command()
@contest_options
def controllers(
    model: Path | None,
    reward: Path | None,
    judge: Path | None,
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
    """Compare alignment methods at equal numbers of rollouts, each tuned, best-of-n in hindsight.

    Runs are kept in OUT as they come: the same command goes on where it was stopped. report.md and report.json say what
    was found, with 95% intervals over prompts. Without --pair and --method: all of them.

    \b
    Examples:
      aisp-local bench controllers -o contest
      aisp-local bench controllers -o mine -m model.gguf -r my_reward --prompts prompts.json
    """
    from aisp_local.bench import contest_run

    chosen = contest_run.chosen_pairs(model, reward, judge, prompts, pairs, max_prompts, max_tokens)
    entries = contest_run.chosen_entries(methods)
    contest_run.run(
        chosen,
        entries,
        out,
        budgets=sorted(set(budgets)) or BUDGETS,
        exact_kl=exact_kl,
        seed=seed,
        threads=threads,
        say=lambda line: click.echo(line, err=True),
        show=click.echo,
        command=again(),
    )


@bench.command()
@contest_options
def quality(
    model: Path | None,
    reward: Path | None,
    judge: Path | None,
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
    """Compare methods as somebody who chooses one would: at equal rollouts, at equal time, and what a judge says.

    quality.html (a page that needs nothing else), quality.md and quality.json in OUT hold rewards with 95% intervals,
    p-values of the differences to best-of-n corrected for their number, wins, the rollouts that reach what best-of-n
    reaches, the score of a judge that no search saw, nats, diversity and likelihood. Every response is kept in
    OUT/runs.jsonl, and the same command goes on where it was stopped; `bench controllers` uses the same runs. Without
    --pair: stories-words and dialogs, whose rewards are fast; without --method: eight of them.

    \b
    Examples:
      aisp-local bench quality -o quality
      aisp-local bench quality -o mine -m model.gguf -r my_reward --judge other_reward --prompts prompts.json
    """
    from aisp_local.bench import contest_run

    own = model is not None or reward is not None or prompts is not None
    names = pairs if pairs or own else contest_run.QUALITY_PAIRS
    chosen = contest_run.chosen_pairs(model, reward, judge, prompts, names, max_prompts, max_tokens)
    text = contest_run.run_quality(
        chosen,
        contest_run.chosen_entries(methods or contest_run.QUALITY),
        out,
        budgets=sorted(set(budgets)) or BUDGETS,
        exact_kl=exact_kl,
        seed=seed,
        threads=threads,
        say=lambda line: click.echo(line, err=True),
        command=again(),
    )
    click.echo(text)


@bench.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--list", "list_", is_flag=True, help="What there is, and which question each answers.")
@click.option("-m", "--model", type=MODEL, help="GGUF model. Default: a shipped pair.")
@click.option("-r", "--reward", type=FILE, help="What rewards its answers.")
@click.option("--prompts", type=FILE, help="JSON file of two lists, tuning and evaluation.")
@click.option("--max-prompts", type=click.IntRange(1), help="Prompts. Default: each experiment's own, 2 to 8.")
@click.option("--max-tokens", type=click.IntRange(1), default=96, show_default=True)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--threads", type=int, help="CPU threads for decoding.")
@click.option("--small", is_flag=True, help="Sizes that only show that it runs.")
@click.option("--lora", type=FILE, help="LoRA adapter, for the experiment with one.")
@click.option("-o", "--out", type=FILE, help="Folder of results.")
def experiment(
    names: tuple[str, ...],
    list_: bool,
    model: Path | None,
    reward: Path | None,
    prompts: Path | None,
    max_prompts: int | None,
    max_tokens: int,
    seed: int,
    threads: int | None,
    small: bool,
    lora: Path | None,
    out: Path | None,
) -> None:
    """Repeat an experiment on how alignment by pre-logits works; each writes NAME.md, NAME.json and plots into OUT.

    Without NAME: all of them, which takes some two and a half hours on one core. Each page names the command that
    makes it again.

    \b
    Examples:
      aisp-local bench experiment --list
      aisp-local bench experiment lambda map -o results
      aisp-local bench experiment noise -o mine -m model.gguf -r my_reward --prompts prompts.json
    """
    from aisp_local.bench import experiment_run
    from aisp_local.bench.experiments import EXPERIMENTS
    from aisp_local.errors import InputError

    if list_:
        for each in EXPERIMENTS.values():
            click.echo(f"{each.name:14}{each.question}")
        return
    if out is None:
        raise InputError("give a folder for the results with -o")
    experiment_run.run(
        names,
        out,
        model=model,
        reward=reward,
        prompts=prompts,
        max_prompts=max_prompts,
        max_tokens=max_tokens,
        seed=seed,
        threads=threads,
        small=small,
        lora=lora,
        say=lambda line: click.echo(line, err=True),
        show=click.echo,
    )


@bench.command()
@click.option("-m", "--model", type=MODEL, help="GGUF model. Default: the shipped one.")
@click.option("-r", "--reward", type=FILE, help="What rewards its answers.")
@click.option("--prompts", type=FILE, help="JSON file of two lists; those of tuning are used.")
@click.option("--responses", type=click.IntRange(1), default=64, show_default=True, help="Of each prompt.")
@click.option("--max-tokens", type=click.IntRange(1), default=96, show_default=True)
@click.option("--epochs", type=click.IntRange(1), default=60, show_default=True)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--threads", type=int, help="CPU threads for decoding.")
@click.option("-o", "--out", type=FILE, required=True, help="File of the value function.")
def value(
    model: Path | None,
    reward: Path | None,
    prompts: Path | None,
    responses: int,
    max_tokens: int,
    epochs: int,
    seed: int,
    threads: int | None,
    out: Path,
) -> None:
    """Train the value function that the method re-control needs (with PyTorch), for one model and reward.

    \b
    Examples:
      aisp-local bench value -o value.safetensors
      aisp-local generate "Tell me a story." --method re-control --option value=value.safetensors
    """
    from aisp_local.api import Aligner
    from aisp_local.bench import value as made
    from aisp_local.bench.contest_run import chosen_pairs
    from aisp_local.files import check_output

    check_output(out)
    made.check_torch()
    own = model is not None or reward is not None or prompts is not None
    (pair,) = chosen_pairs(model, reward, None, prompts, [] if own else ["stories"], None, max_tokens)

    def say(line: str) -> None:
        click.echo(line, err=True)

    with Aligner.load(pair.model, pair.reward, threads=threads) as aligner:
        episodes = made.collect(aligner, pair.tuning, n=responses, max_tokens=max_tokens, seed=seed, say=say)
    found, figures = made.train(episodes, epochs=epochs, seed=seed, say=say)
    found.save(out)
    shares = ", ".join(f"{name} {figures[name]:.2f}" for name in ("first", "mean", "last"))
    click.echo(f"{out}: correlation with the reward of {figures['held_out']:.0f} responses held out: {shares} value")


@bench.command()
@click.argument("folder", type=FILE)
@click.option("--method", "methods", multiple=True, help="Labels to compare. Default: all that there are.")
@click.option("--results", is_flag=True, help="Ask nothing, and show what the ratings so far say.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
def rate(folder: Path, methods: tuple[str, ...], results: bool, seed: int) -> None:
    """Say which of two answers is better, not knowing whose they are; FOLDER is one of `bench quality`.

    Each rating is written into FOLDER/ratings.jsonl at once; the same command goes on with those that are left. At the
    end: how often each method was preferred, by you and by the reward. Before the end that would tell whose answers
    are still to come; --results shows it all the same.

    \b
    Examples:
      aisp-local bench rate quality
      aisp-local bench rate quality --method score --method best-of-n
      aisp-local bench rate quality --results
    """
    from aisp_local.bench import rating
    from aisp_local.cli.output import print_answer

    answers = rating.read_answers(folder)
    asked = rating.questions(answers, methods, seed)
    ratings = rating.Ratings(folder / "ratings.jsonl")

    def ask(text: str) -> str:
        try:
            return str(click.prompt(text, default="", show_default=False, prompt_suffix=": ", err=True))
        except click.Abort:
            raise EOFError from None

    if not results:
        rating.rate(asked, ratings, ask, print_answer)
    counted = ratings.about(rating.questions(answers, (), seed))
    if gone := len(ratings.all) - len(counted):
        click.echo(f"{gone} ratings of answers that are no longer there do not count", err=True)
    if not results and (left := len(list(ratings.left(asked)))):
        click.echo(
            f"{left} of {len(asked)} are left: the same command goes on (--results: what is said so far)", err=True
        )
        return
    print_answer("\n" + rating.table(counted, answers).markdown())
