"""Experiments of a command line, each on its own pair of model and reward."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from aisp_local.api import Aligner
from aisp_local.bench.contest_run import chosen_pairs
from aisp_local.bench.experiments import EXPERIMENTS
from aisp_local.bench.experiments.lab import Lab, write
from aisp_local.errors import InputError
from aisp_local.types import Message


def _said(say: Callable[[str], None], name: str, line: str) -> None:
    say(f"{name}: {line}")


def run(
    names: Sequence[str],
    out: Path,
    *,
    model: Path | None,
    reward: Path | None,
    prompts: Path | None,
    max_prompts: int,
    max_tokens: int,
    seed: int,
    threads: int | None,
    small: bool,
    lora: Path | None,
    say: Callable[[str], None],
    show: Callable[[str], None],
) -> None:
    """Run those named, or all. Raises InputError for an unknown one, and when OUT cannot be used."""
    unknown = sorted(set(names) - set(EXPERIMENTS))
    if unknown:
        raise InputError(f"the experiment {unknown[0]!r} is unknown; use {', '.join(EXPERIMENTS)}")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out} cannot be made ({error.strerror}); give another folder") from error
    for name in names or EXPERIMENTS:
        experiment = EXPERIMENTS[name]
        own = model is not None or reward is not None or prompts is not None
        (pair,) = chosen_pairs(model, reward, None, prompts, [] if own else [experiment.pair], max_prompts, max_tokens)
        began = time.perf_counter()
        with Aligner.load(pair.model, pair.reward, threads=threads) as aligner:
            asked: list[list[Message]] = [[{"role": "user", "content": text}] for text in pair.evaluation]
            lab = Lab(aligner, asked, pair.max_tokens, seed, small, partial(_said, say, name), lora)
            finding = experiment.run(lab)
        seconds = time.perf_counter() - began
        about = f"{Path(pair.model).name} with {Path(pair.reward).name}, {len(asked)} prompts, {seconds:.0f} s"
        show(write(out, experiment, finding, about))
