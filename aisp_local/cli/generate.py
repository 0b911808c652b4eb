"""`aisp-local generate`: one prompt in, one aligned answer out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from aisp_local.cli.batch import DEFAULT_AT_ONCE, Batch, content
from aisp_local.cli.help import ExamplesFirst
from aisp_local.cli.input import standard_input
from aisp_local.cli.live import BatchLine, ProgressLine, Streamed, stop_on_interrupt
from aisp_local.cli.names import FILE
from aisp_local.cli.options import (
    budget_options,
    check_steering,
    load,
    method_options,
    model_options,
    read_grammar,
    rollouts,
    say_where_from,
    search_options,
    typed,
)
from aisp_local.cli.output import print_answer
from aisp_local.defaults import STREAMED, check_search
from aisp_local.errors import InputError
from aisp_local.files import check_apart, check_output, write_output
from aisp_local.finite import finite
from aisp_local.steering import Steering
from aisp_local.trace import as_json
from aisp_local.types import Limits

if TYPE_CHECKING:
    from aisp_local.api import Aligner


def read_prompt(prompt: str) -> str:
    """The prompt itself, or standard input for ``-``. Raises InputError if it is empty or not UTF-8."""
    if prompt == "-":
        prompt = standard_input("give the prompt as an argument")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError("the prompt is not valid UTF-8; convert it to UTF-8") from error
    if not prompt.strip():
        raise InputError("the prompt is empty; give some text")
    return prompt


def answer_all(batch: Batch, aligner: Aligner, output: Path | None) -> None:
    """Answer a file of prompts; say on standard error what became of it. Exits with 1 or 130 unless all is well."""
    line = BatchLine()
    try:
        with stop_on_interrupt() as stop:
            outcome = batch.run(aligner, output, as_json, stop, line)
    finally:
        line.clear()
    total = len(batch.questions)
    place = "" if output is None else f" in {output}"
    if outcome.failed:
        lines = ", ".join(map(str, outcome.failed[:8])) + (", ..." if len(outcome.failed) > 8 else "")
        which = "line" if len(outcome.failed) == 1 else "lines"
        click.echo(f'{len(outcome.failed)} of {total} prompts failed; see "error" of {which} {lines}{place}', err=True)
    if stop.set:
        click.echo(f"interrupted: {outcome.answered} of {total} answers are there{place}", err=True)
        sys.exit(130)
    if outcome.failed:
        sys.exit(1)
    if line.enabled:
        click.echo(f"{total} answers{place}", err=True)


@click.command(cls=ExamplesFirst)
@click.argument("prompt", required=False)
@click.option(
    "-i",
    "--input",
    "source",
    type=FILE,
    help="Answer a file of prompts, JSON lines in and out (docs/batch.md). The same command goes on after a kill.",
)
@click.option(
    "--at-once", type=int, help=f"Prompts of --input that are answered together. Without it {DEFAULT_AT_ONCE}."
)
@click.option("--strict", is_flag=True, help="With --input: stop at the first line without an answer.")
@click.option("--save-steering", type=FILE, help="Write what this search learnt to a file.")
@click.option("--json", "json_", is_flag=True, help="Print a JSON object with every candidate.")
@click.option("--judge-all", is_flag=True, help="The judge scores every candidate (with --json or --trace).")
@click.option("--trace", type=FILE, help="Write all of the search to a file (see replay, explain).")
@click.option("--kl", is_flag=True, help="Compute the sequence KL (a second output product a step).")
@click.option("--raw", is_flag=True, help="Continue PROMPT as plain text, without the chat template.")
@click.option("-o", "--output", type=FILE, help="Write the answer to a file.")
@click.option(
    "--timeline",
    type=FILE,
    help="Write where the time went to a file, for https://ui.perfetto.dev or chrome://tracing.",
)
@budget_options
@model_options
@search_options
def generate(
    prompt: str | None,
    source: Path | None,
    at_once: int | None,
    strict: bool,
    effort: str,
    budget: int | None,
    budget_tokens: int | None,
    target_reward: float | None,
    patience: int | None,
    steering: Path | None,
    save_steering: Path | None,
    json_: bool,
    judge_all: bool,
    kl: bool,
    raw: bool,
    output: Path | None,
    timeline: Path | None,
    trace: Path | None,
    model: Path | None,
    lora: tuple[Path, ...],
    lora_scaled: tuple[tuple[Path, float], ...],
    reward: Path | None,
    judge: Path | None,
    n_gpu_layers: int | None,
    threads: int | None,
    method: str,
    strength: float | None,
    more: tuple[str, ...],
    max_tokens: int,
    rows: int | None,
    seed: int,
    stream: bool,
    time_limit: float | None,
    grammar_file: Path | None,
    json_schema: str | None,
) -> None:
    """Answer PROMPT, or a file of prompts with --input; `-` is standard input.

    \b
    Examples:
      aisp-local generate "Tell me a story about a fox."
      aisp-local generate "Write a short story that uses the words cat, ball and tree." --effort medium --json
      cat prompt.txt | aisp-local generate - --method best-of-n -m model.gguf -r my_reward
      aisp-local generate --input prompts.jsonl -o answers.jsonl
    """
    if (prompt is None) == (source is None):
        raise InputError("give either a PROMPT (- for standard input) or --input FILE")
    one = any(file is not None for file in (timeline, save_steering, trace))
    if source is not None and (one or (stream and typed("stream"))):
        raise InputError("--stream, --timeline, --trace and --save-steering are for one prompt; leave out --input")
    if source is None and (typed("at_once") or typed("strict")):
        raise InputError("--at-once and --strict are for --input FILE")
    text = "" if prompt is None else read_prompt(prompt)
    if output is not None:
        check_output(output)
    elif sys.stdout is None:
        raise InputError("standard output is closed; use -o FILE")
    for written in (timeline, save_steering, trace):
        if written is not None:
            check_output(written)
    adapters = (*lora, *(file for file, _ in lora_scaled))
    check_apart([source, model, reward, judge, grammar_file, *adapters], [output, timeline, save_steering, trace])
    check_apart([steering], [output, timeline, trace])  # what is learnt may take the place of what it began with
    check_steering(method, "--save-steering", save_steering)
    check_steering(method, "--steering", steering)
    kept = None if steering is None else Steering.load(steering)
    budget = rollouts(budget, effort)
    parts = rows is not None and typed("rows") and rows < budget
    # What stands in the settings gives way to what the command line asks for.
    if not typed("stream"):
        ended = parts or (budget_tokens, target_reward, patience) != (None, None, None)
        stream &= source is None and not json_ and output is None and not ended and method in STREAMED
    elif stream:
        json_, budget_tokens = json_ and typed("json_"), budget_tokens if typed("budget_tokens") else None
        target_reward, patience = (
            target_reward if typed("target_reward") else None,
            patience if typed("patience") else None,
        )
    if stream and (json_ or output is not None):
        raise InputError("--stream prints the answer as it settles; leave out --json and -o")
    if stream and (parts or (budget_tokens, target_reward, patience) != (None, None, None)):
        raise InputError(
            "--stream decodes all rollouts in one iteration; leave out --rows, --budget-tokens, --target-reward and "
            "--patience"
        )
    options = method_options(method, strength, stream, more)
    rows = budget if stream else rows
    grammar = read_grammar(grammar_file, json_schema)
    check_search(
        method=method, budget=budget, n=rows, max_tokens=max_tokens, seed=seed, time_limit=time_limit, **options
    )
    Limits(target_reward, patience, budget_tokens)
    search = {
        "method": method,
        "budget": budget,
        "n": rows,
        "max_tokens": max_tokens,
        "seed": seed,
        "grammar": grammar,
        "time_limit": time_limit,
        "target_reward": target_reward,
        "patience": patience,
        "budget_tokens": budget_tokens,
        "steering": kept,
        "kl": kl,
        **options,
    }
    named = (model, lora, lora_scaled, reward, judge, n_gpu_layers, threads)
    if source is not None:
        search |= {"baseline": True, "judge_all": judge_all}
        about = {"raw": raw, "reward": content(reward), "judge": content(judge), "steering": content(steering)}
        batch = Batch(source, search, about, raw=raw, strict=strict, at_once=at_once)
        answer_all(batch, load(*named), output)
        return
    aligner = load(*named)
    say_where_from(kept, aligner)
    line = (Streamed if stream else ProgressLine)(max_tokens=max_tokens)
    with stop_on_interrupt() as stop:
        result = aligner.generate(
            text if raw else [{"role": "user", "content": text}],
            baseline=json_ or trace is not None,
            judge_all=judge_all and (json_ or trace is not None),
            timeline=timeline,
            stop=stop,
            on_progress=line,
            **search,
        )
    if isinstance(line, Streamed):
        line.finish(result.answer)
    line.clear()
    if result.status == "interrupted":
        click.echo("interrupted: this is the best answer so far", err=True)
    elif result.status == "incomplete":
        click.echo("no answer was complete under the grammar; allow more with --max-tokens", err=True)
    if aligner.judge is not None and not json_:
        said = "failed" if result.judge is None else f"{result.judge:.2f}"
        click.echo(f"[reward {result.reward:.2f}, judge {said}]", err=True)
    shown = json.dumps(finite(as_json(result)), ensure_ascii=False, indent=2) if json_ else result.answer
    if output is not None:
        write_output(output, shown + "\n")
    elif not stream:
        print_answer(shown)
    if trace is not None:
        aligner.trace(result).save(trace)
    if save_steering is not None:
        learnt = aligner.steering(result)
        if not learnt.u.any():
            click.echo("nothing was learnt (strength 0, or rewards that do not differ): the steering is zero", err=True)
        learnt.save(save_steering)
