"""Experiments of a command line, each on its own pair of model and reward."""

from __future__ import annotations

import os.path
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from aisp_local import shipped
from aisp_local.api import Aligner
from aisp_local.bench.contest import Pair
from aisp_local.bench.contest_run import chosen_pairs
from aisp_local.bench.experiments import EXPERIMENTS
from aisp_local.bench.experiments.lab import Experiment, Lab, write
from aisp_local.errors import AispError, InputError
from aisp_local.files import check_output
from aisp_local.types import Message

MAX_TOKENS, SEED = 96, 0
"""What the command takes where nobody says otherwise."""


def _said(say: Callable[[str], None], name: str, line: str) -> None:
    say(f"{name}: {line}")


def _name(path: str | Path) -> str:
    """Of a file or folder, without where it lies."""
    return os.path.basename(os.path.abspath(path))


def command(experiment: Experiment, options: Mapping[str, Path | int | None]) -> str:
    """The line that runs an experiment again, with what it was told otherwise than by default; no folder is named."""
    usual = {"--max-prompts": experiment.prompts, "--max-tokens": MAX_TOKENS, "--seed": SEED, "--small": False}
    words = ["aisp-local", "bench", "experiment", experiment.name, "-o", "results"]
    for option, value in options.items():
        if value is not None and value != usual.get(option):
            words += [option] if value is True else [option, _name(value) if isinstance(value, Path) else str(value)]
    return shlex.join(words)


def run(
    names: Sequence[str],
    out: Path,
    *,
    model: Path | None,
    reward: Path | None,
    prompts: Path | None,
    max_prompts: int | None,
    max_tokens: int,
    seed: int,
    threads: int | None,
    small: bool,
    lora: Path | None,
    say: Callable[[str], None],
    show: Callable[[str], None],
) -> None:
    """Run those named, or all that can be. Of several, one that fails leaves the others alone.

    Raises InputError for an unknown one, too few prompts, a missing adapter, and when OUT cannot be used; AispError at
    the end where one of several failed.
    """
    unknown = sorted(set(names) - set(EXPERIMENTS))
    if unknown:
        raise InputError(f"the experiment {unknown[0]!r} is unknown; use {', '.join(EXPERIMENTS)}")
    own = model is not None or reward is not None or prompts is not None
    chosen: list[tuple[Experiment, Pair]] = []
    for experiment in map(EXPERIMENTS.__getitem__, names or EXPERIMENTS):
        most = experiment.prompts if max_prompts is None else max_prompts
        (pair,) = chosen_pairs(model, reward, None, prompts, [] if own else [experiment.pair], most, max_tokens)
        if len(pair.evaluation) < experiment.least:
            raise InputError(
                f"the experiment {experiment.name!r} compares prompts, and {len(pair.evaluation)} is too few; "
                f"give --max-prompts {experiment.least} or more, and as many prompts"
            )
        if experiment.adapter and lora is None and pair.model != str(shipped.model()):
            missing = "give an adapter of this model with --lora; models/adapt.py trains one"
            if names:
                raise InputError(f"{experiment.name}: {missing}")
            say(f"{experiment.name} is left out: {missing}")
            continue
        chosen.append((experiment, pair))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out} cannot be made ({error.strerror}); give another folder") from error
    for experiment, _ in chosen:
        check_output(out / f"{experiment.name}.md")
    failed = []
    for experiment, pair in chosen:
        began = time.perf_counter()
        try:
            with Aligner.load(pair.model, pair.reward, threads=threads) as aligner:
                asked: list[list[Message]] = [[{"role": "user", "content": text}] for text in pair.evaluation]
                lab = Lab(aligner, asked, pair.max_tokens, seed, small, partial(_said, say, experiment.name), lora)
                finding = experiment.run(lab)
            seconds = time.perf_counter() - began
            about = f"{_name(pair.model)} with {_name(pair.reward)}, {len(asked)} prompts, {seconds:.0f} s"
            options = {"-m": model, "-r": reward, "--prompts": prompts, "--lora": lora, "--max-prompts": max_prompts}
            options |= {"--max-tokens": max_tokens, "--seed": seed, "--small": small}
            show(write(out, experiment, finding, about, command(experiment, options)))
        except AispError as error:
            if len(chosen) == 1:
                raise
            say(f"{experiment.name} failed: {error}")
            failed.append(experiment.name)
    if failed:
        raise AispError(f"{', '.join(failed)} failed, for what is said above; the pages of the others are in {out}")
