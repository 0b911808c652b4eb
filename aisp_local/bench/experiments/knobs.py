"""What the default method's few settings do: how far it may move, and how often it selects."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from aisp_local.bench.contest import answer_logprobs
from aisp_local.bench.contest_report import interval, number, shown
from aisp_local.bench.experiments.lab import (
    SETTINGS,
    Experiment,
    Finding,
    Lab,
    best_of,
    last,
    mean,
    rewards,
    row,
    variety,
)
from aisp_local.bench.tables import Table
from aisp_local.controllers.score import FULL_KL
from aisp_local.engine import LlamaEngine
from aisp_local.types import Result

_N = 32


def _likelihood(lab: Lab, results: Sequence[Result]) -> float:
    """Log-likelihood a token of the answers under the base model, mean over prompts."""
    engine, found = lab.aligner.engine, []
    if isinstance(engine, LlamaEngine):
        for prompt, result in zip(lab.prompts, results, strict=True):
            logprobs = answer_logprobs(engine, prompt, result.answer)
            found += [] if logprobs is None else [float(logprobs.mean())]
    return float(np.mean(found)) if found else float("nan")


def _strength(lab: Lab) -> Finding:
    budget = lab.size(256, 64)
    made = Table(
        "strength",
        f"score, {budget} rollouts in iterations of {_N}, means over {len(lab.prompts)} prompts",
        [
            "strength",
            "nats allowed",
            "best of 32",
            "best of all [95%]",
            "mean of the last iteration",
            "its nats, as counted",
            "KL of the second, truncation included",
            "variety of the last",
            "log-likelihood a token of the answer",
        ],
    )
    data = []
    for strength in lab.some((0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)):
        results = lab.search("score", budget, _N, strength=strength)
        exact = lab.search("score", 2 * _N, _N, strength=strength, kl=True)  # a second output product a step
        found = rewards(results)
        figures: dict[str, Any] = {
            "strength": strength,
            "allowed": FULL_KL * strength**2,
            "first": float(mean(best_of(found[:, :_N]))),
            "best": float(mean(best_of(found))),
            "best_interval": interval(best_of(found)),
            "last": float(mean(found[:, -_N:])),
            "counted": last(results, lambda s: s.kl),
            "kl": last(exact, lambda s: s.kl),
            "variety": variety(results),
            "likelihood": _likelihood(lab, results),
        }
        data.append(figures)
        made.rows.append(
            [
                f"{strength:g}",
                f"{figures['allowed']:.1f}",
                number(figures["first"]),
                shown(figures["best_interval"]),
                number(figures["last"]),
                *(number(figures[key], ".1f") for key in ("counted", "kl")),
                *(number(figures[key]) for key in ("variety", "likelihood")),
            ]
        )
    return Finding([made], data=data)


STRENGTH = Experiment(
    "strength",
    "What does --strength buy, and what does it cost?",
    "reward and nats rise with strength, the reward steeply at first: the first few nats select the obvious. 0 is the "
    "base model at temperature 1, whose best of so many is best-of-n's. The count of nats stays within what is "
    "allowed; what min-p cuts off comes on top. Likelihood and variety fall towards 1.",
    _strength,
    "stories-judge",
)


def _blocks(lab: Lab) -> Finding:
    budget = lab.size(128, 64)
    made = Table(
        "blocks",
        f"{budget} rollouts in iterations of {_N}, {len(lab.prompts)} prompts, four at once; seconds: of decoding, "
        "the reward and the update, in this run",
        ["blocks", "best of 32", "best of all [95%]", "texts scored a rollout", "seconds a prompt", "over best-of-n's"],
    )
    data: list[dict[str, Any]] = []
    ways: list[tuple[str, str, dict[str, Any]]] = [(row("best-of-n"), "best-of-n", dict(SETTINGS["best-of-n"]))]
    ways += [("nothing selected", "score", {"selection": 0.0})]
    ways += [(f"{int(b)}", "score", {"blocks": int(b)}) for b in lab.some((2, 4, 8, 16))]
    for label, method, options in ways:
        began = time.perf_counter()
        results = lab.search(method, budget, _N, **options)
        seconds = (time.perf_counter() - began) / len(lab.prompts)
        found, scored = rewards(results), sum(s.n_scored for result in results for s in result.iterations)
        figures: dict[str, Any] = {
            "blocks": label,
            "first": float(mean(best_of(found[:, :_N]))),
            "best": float(mean(best_of(found))),
            "best_interval": interval(best_of(found)),
            "scored": scored / found.size,
            "seconds": seconds,
        }
        data.append(figures)
        made.rows.append(
            [
                label,
                number(figures["first"]),
                shown(figures["best_interval"]),
                f"{figures['scored']:.1f}",
                f"{seconds:.2f}",
                f"{seconds / data[0]['seconds']:.2f}",
            ]
        )
    return Finding([made], data=data)


BLOCKS = Experiment(
    "blocks",
    "How often should unfinished rollouts be selected?",
    "more blocks find more, with less and less to gain, and the reward reads as many more texts, which is what the "
    "time goes to where it shares the processor; without selection the control costs next to nothing and finds less.",
    _blocks,
    "stories-judge",
)
