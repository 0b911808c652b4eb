"""Options that commands share, and the aligner that they describe."""

from __future__ import annotations

import json
import keyword
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from aisp_local.cli.names import FILE, MODEL, REWARD, completing
from aisp_local.controllers import builder, method_names, options_of
from aisp_local.defaults import (
    DEFAULT_EFFORT,
    DEFAULT_MAX_TOKENS,
    DEFAULT_METHOD,
    DEFAULT_N,
    DEFAULT_N_WHOLE,
    DEFAULT_SEED,
    EFFORT,
    MAX_ROWS,
    STREAMED,
    budget_of,
)
from aisp_local.errors import InputError
from aisp_local.files import read_text
from aisp_local.grammar import Grammar

if TYPE_CHECKING:
    from aisp_local.api import Aligner
    from aisp_local.steering import Steering

F = TypeVar("F", bound=Callable[..., Any])


def _debug(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value:
        context.find_root().params["debug"] = True


class _Method(click.Option):
    """Names the methods in its help; it asks for those of other packages only then."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        self.help = f"One of {', '.join(method_names())}."
        return super().get_help_record(ctx)


def model_options(command: F) -> F:
    """-m, --lora, --lora-scaled, -r, --judge, --n-gpu-layers, --threads, --debug"""
    for option in (
        click.option(
            "--debug", is_flag=True, expose_value=False, callback=_debug, help="Show the traceback of an error."
        ),
        click.option("--threads", type=int, help="CPU threads for decoding."),
        click.option(
            "--n-gpu-layers",
            type=int,
            envvar="AISP_N_GPU_LAYERS",
            help="Layers on the GPU (0: none, -1: all).",
        ),
        click.option(
            "--judge",
            type=REWARD,
            envvar="AISP_JUDGE",
            help="Another reward, as for -r: its score of the answer is shown, never optimised.",
        ),
        click.option(
            "-r",
            "--reward",
            type=REWARD,
            envvar="AISP_REWARD",
            help="Reward folder (with reward.json), TOML file, or a name of `reward list`, such as the recipes "
            "kind-and-safe and short-and-plain. Default: the shipped one.",
        ),
        click.option(
            "--lora-scaled",
            type=(FILE, float),
            multiple=True,
            metavar="FILE SCALE",
            help="The same, with what it adds multiplied.",
        ),
        click.option(
            "--lora",
            type=FILE,
            multiple=True,
            help="LoRA adapter of the model, a GGUF file. The model with it is what is aligned. Can be given again.",
        ),
        click.option(
            "-m",
            "--model",
            type=MODEL,
            envvar="AISP_MODEL",
            help="GGUF model: a file, or a name of `models list`. Default: the shipped one.",
        ),
    ):
        command = option(command)
    return command


def budget_options(command: F) -> F:
    """--effort, --budget, and what ends a search sooner or starts it further: --budget-tokens, --target-reward,
    --patience, --steering
    """
    for option in (
        click.option("--steering", type=FILE, help="Start with what an earlier search learnt: its file."),
        click.option(
            "--patience", type=int, help="Stop after so many iterations (see --rows) without a better answer."
        ),
        click.option(
            "--target-reward", type=float, help="Stop after the iteration (see --rows) that reaches this reward."
        ),
        click.option("--budget-tokens", type=int, help="Stop after about so many decoded tokens."),
        click.option("--budget", type=int, help="Rollouts an answer, in the place of an effort's."),
        click.option(
            "--effort",
            type=click.Choice(list(EFFORT)),
            default=DEFAULT_EFFORT,
            show_default=True,
            help=f"Rollouts an answer: {', '.join(map(str, EFFORT.values()))}.",
        ),
    ):
        command = option(command)
    return command


def rollouts(budget: int | None, effort: str) -> int:
    """Of an answer: an effort on the command line goes before a budget in the settings (see ``layered``)."""
    return budget_of(None if typed("effort") and not typed("budget") else budget, effort)


def search_options(command: F) -> F:
    """--method, --strength, --option, --max-tokens, --seed, --rows, --stream, --time-limit, and what answers must be"""
    for option in (
        click.option(
            "--json-schema",
            metavar="SCHEMA",
            help="Answers are JSON of this schema: the schema itself, or its file.",
        ),
        click.option(
            "--grammar-file",
            type=FILE,
            help="Answers are texts of this grammar, in llama.cpp's notation (GBNF).",
        ),
        click.option(
            "--time-limit",
            "--budget-seconds",
            "time_limit",
            type=float,
            help="Seconds; then the best answer so far.",
        ),
        click.option(
            "--option",
            "more",
            multiple=True,
            metavar="NAME=VALUE",
            help="Any other option of the method, such as blocks=4 (docs/methods.md). Can be given again.",
        ),
        click.option("--seed", type=int, default=DEFAULT_SEED, show_default=True),
        click.option(
            "--rows",
            type=int,
            help=f"Rollouts an iteration, up to {MAX_ROWS}. Without it {DEFAULT_N}; {DEFAULT_N_WHOLE} with a reward of "
            "whole responses only; a quarter of the budget, up to 16, with a method that learns between them only.",
        ),
        click.option(
            "--stream/--no-stream",
            help="Choose block by block and print what is chosen. All rollouts are decoded at once, and what choosing "
            "takes in nats is not held to --strength (docs/score.md).",
        ),
        click.option("--max-tokens", type=int, default=DEFAULT_MAX_TOKENS, show_default=True),
        click.option(
            "--strength",
            type=click.FloatRange(0.0, 1.0),
            help="How far the default method may move from the model: 0 not at all, 1 by 80 nats. Without it 0.5.",
        ),
        click.option(
            "--method",
            cls=_Method,
            default=DEFAULT_METHOD,
            show_default=True,
            shell_complete=completing(method_names),
        ),
    ):
        command = option(command)
    return command


def typed(name: str) -> bool:
    """Whether an option stands on the command line, and not in the settings."""
    context = click.get_current_context(silent=True)
    return context is None or context.get_parameter_source(name) == ParameterSource.COMMANDLINE


def settable(method: str) -> set[str]:
    """Options of a method that words can set."""
    return options_of(method) - {"steering", "steering_nats"}


def method_options(method: str, strength: float | None, stream: bool, more: Sequence[str]) -> dict[str, Any]:
    """Options of the method that were given; a setting is for the methods that have it."""
    options: dict[str, Any] = {} if strength is None else {"strength": strength}
    if not typed("strength") and "strength" not in options_of(method):
        options = {}
    for text in more:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise InputError(f"--option {text} is not of the form NAME=VALUE")
        if keyword.iskeyword(name):  # lambda, which Python cannot call so
            name += "_"
        if name not in settable(method):
            if not typed("more"):
                continue
            known = ", ".join(sorted(settable(method))) or "none"
            raise InputError(f"method {method!r} has no option {name!r}; its options are {known}")
        if name == "strength" and name in options and typed("strength") and typed("more"):
            raise InputError("--strength and --option strength=... are the same; leave one out")
        try:
            options[name] = json.loads(value)
        except ValueError:  # a name or a path
            options[name] = value
    if stream:
        if method not in STREAMED:
            raise InputError(f"--stream needs the method {' or '.join(STREAMED)}; {method!r} chooses at the end")
        options |= STREAMED[method]
    return options


def check_steering(method: str, option: str, given: object) -> None:
    """Raises InputError where a method cannot start with a control, nor keep one."""
    if given is not None and not hasattr(builder(method), "held"):
        raise InputError(f"{option} needs a method that holds a control, such as score; {method!r} does not")


def say_where_from(steering: Steering | None, aligner: Aligner) -> None:
    """What a control was learnt from is no error: it may help all the same."""
    name = aligner.reward.name
    if steering is not None and steering.reward not in ("", name):
        click.echo(f"the steering was learnt with the reward {steering.reward!r}, and here it is {name!r}", err=True)


def read_grammar(grammar_file: Path | None, json_schema: str | None) -> Grammar | None:
    """What --grammar-file or --json-schema says. Raises InputError."""
    if grammar_file is not None and json_schema is not None:
        raise InputError("--grammar-file and --json-schema are two ways to say the same; give one of them")
    if grammar_file is not None:
        return Grammar.of(read_text(grammar_file))
    if json_schema is None:
        return None
    inline = json_schema.lstrip().startswith("{")
    where = "--json-schema" if inline else json_schema
    text = json_schema if inline else read_text(Path(json_schema))
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not valid JSON ({error})") from error
    if not isinstance(schema, dict):
        raise InputError(f"{where} holds no JSON object; a schema is one")
    return Grammar.of(schema)


def load(
    model: Path | None,
    lora: Sequence[Path],
    lora_scaled: Sequence[tuple[Path, float]],
    reward: Path | None,
    judge: Path | None,
    n_gpu_layers: int | None,
    threads: int | None,
    together: int = 1,
) -> Aligner:
    from aisp_local.api import Aligner
    from aisp_local.native import Lora

    loras = [*map(Lora, lora), *(Lora(path, scale) for path, scale in lora_scaled)]
    return Aligner.load(
        model, reward, judge=judge, n_gpu_layers=n_gpu_layers, threads=threads, loras=loras, together=together
    )
