"""What learning adds to exploring, and whether it comes to the same place twice."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from aisp_local.bench.contest_report import interval, number, shown
from aisp_local.bench.experiments.lab import (
    SETTINGS,
    WORDS,
    Array,
    Experiment,
    Finding,
    Lab,
    best_of,
    mean,
    rewards,
    row,
    spread_of,
)
from aisp_local.bench.tables import Table
from aisp_local.controllers import Aisp, AispHeld, AispStatic, Controller
from aisp_local.loop import search
from aisp_local.types import FloatArray, Result

_N = 16
_LEARNING: Mapping[str, Callable[..., Any]] = {"aisp": Aisp, "aisp-held": AispHeld}


def _each(lab: Lab, controllers: Sequence[Controller], method: str, budget: int, n: int = _N) -> list[Result]:
    """A search a prompt, with a controller that was made before."""
    return [
        search(
            lab.aligner.engine,
            controller,
            lab.aligner.reward,
            prompt,
            method=method,
            budget=budget,
            n=n,
            max_tokens=lab.max_tokens,
            seed=lab.seed,
            prompt_index=i,
        )
        for i, (prompt, controller) in enumerate(zip(lab.prompts, controllers, strict=True))
    ]


def _made(lab: Lab, make: Callable[..., Any], **options: Any) -> list[Any]:
    d = lab.aligner.engine.d
    return [
        make(d=d, max_tokens=lab.max_tokens, seed=lab.seed, prompt_index=i, **options) for i in range(len(lab.prompts))
    ]


def _adaptation(lab: Lab) -> Finding:
    budget = lab.size(128, 32)
    learning = [
        Aisp(d=lab.aligner.engine.d, max_tokens=lab.max_tokens, seed=lab.seed, prompt_index=i)
        for i in range(len(lab.prompts))
    ]
    learnt = _each(lab, learning, "aisp", budget)
    means: list[FloatArray] = [controller.mean for controller in learning]
    others = [means[-1], *means[:-1]]  # of the prompt before
    kinds = {
        "0 (aisp-static)": _each(lab, _made(lab, AispStatic), "aisp-static", budget),
        "learnt (aisp)": learnt,
        "another prompt's, frozen": _each(
            lab,
            [
                AispStatic(d=lab.aligner.engine.d, max_tokens=lab.max_tokens, seed=lab.seed, prompt_index=i, mean=mean)
                for i, mean in enumerate(others)
            ],
            "aisp-static",
            budget,
        ),
        "its own, frozen, other noise": _each(
            lab,
            [
                AispStatic(
                    d=lab.aligner.engine.d, max_tokens=lab.max_tokens, seed=lab.seed + 7, prompt_index=i, mean=mean
                )
                for i, mean in enumerate(means)
            ],
            "aisp-static",
            budget,
        ),
    }
    base = rewards(kinds["0 (aisp-static)"])
    made = Table(
        "adaptation",
        f"{budget} rollouts in iterations of {_N}, {len(lab.prompts)} prompts",
        ["mean of the control", "best reward", "over 0 [95%]", "mean of the last iteration", "over 0 [95%]"],
    )
    data = {}
    for name, results in kinds.items():
        found = rewards(results)
        best, end = best_of(found), mean(found[:, -_N:], 1)
        ahead = interval(best - best_of(base)), interval(end - mean(base[:, -_N:], 1))
        over, over_end = (shown(each, sign=True) for each in ahead)
        made.rows.append([name, number(mean(best)), over, number(mean(end)), over_end])
        data[name] = {"best": float(mean(best)), "last": float(mean(end)), "ahead": ahead}
    return Finding([made], data=data)


ADAPTATION = Experiment(
    "adaptation",
    "Does the mean that aisp learns matter, or is its gain exploration alone?",
    "nearly all of aisp's best reward is there with the mean frozen at 0; the mean of another prompt helps no more "
    "than chance, and its own, frozen under other noise, shows how much of what was learnt is more than one lucky "
    "trajectory.",
    _adaptation,
    prompts=8,
    least=2,  # the mean of another prompt is one of the rows
)


def _convergence(lab: Lab) -> Finding:
    budget, seeds, n = lab.size(256, 32), lab.size(5, 2), lab.size(32, 16)
    known = lab.rewarded_by(WORDS)
    made = Table(
        "convergence",
        f"{seeds} seeds, {budget} rollouts in iterations of {n}, {len(lab.prompts)} prompts"
        + ("; the optimum of the reward is 0" if known else ""),
        [
            "method",
            "best reward",
            *(["gap to the optimum"] if known else []),
            "spread over seeds",
            "cosine of U between seeds",
            "spread of the cosine",
        ],
    )
    data = []

    def searched(method: str, seed: int, options: Mapping[str, Any]) -> tuple[Array, list[FloatArray | None]]:
        """Best rewards [prompts] and what was learnt."""
        if method in _LEARNING:
            there = replace(lab, seed=lab.seed + 1000 * seed)
            controllers = _made(there, _LEARNING[method], **options)
            found = _each(there, controllers, method, budget, n)
            return best_of(rewards(found)), [controller.mean.ravel() for controller in controllers]
        found = lab.search(method, budget, n, seed=seed, **options)
        return best_of(rewards(found)), [result.control for result in found]

    ways: list[tuple[str, str, Mapping[str, Any]]] = [
        ("score", "score", {}),
        ("score, nothing selected", "score", {"selection": 0.0}),
        ("aisp", "aisp", {}),
        ("aisp-held", "aisp-held", {}),
        (row("best-of-n"), "best-of-n", SETTINGS["best-of-n"]),
    ]
    for label, method, options in ways:
        runs = [searched(method, seed, options) for seed in range(seeds)]
        best = np.array([run[0] for run in runs])  # [seeds, prompts]
        cosines = [
            float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
            for prompt in zip(*(run[1] for run in runs), strict=True)
            for a, b in itertools.combinations(prompt, 2)
            if a is not None and b is not None and a.any() and b.any()
        ]
        cosine = (float(np.mean(cosines)), float(np.std(cosines))) if cosines else None
        agreement = ["-", "-"] if cosine is None else [f"{value:.2f}" for value in cosine]
        middle, spread = float(mean(best)), float(mean(spread_of(best.T)))
        gap = [f"{-middle:.2f}"] if known else []
        made.rows.append([label, f"{middle:.2f}", *gap, f"{spread:.2f}", *agreement])
        data.append({"method": label, "best": middle, "spread": spread, "cosine and its spread": cosine})
    return Finding([made], data=data)


CONVERGENCE = Experiment(
    "convergence",
    "Do restarts find the same control, and how far from a known optimum do they end?",
    "controls of different seeds agree more than chance (a cosine of 0 in as many directions), least where selection "
    "does most of the work; those of aisp, which has as many directions a step, hardly. The gap to the optimum, "
    "where that is known, is smaller than best-of-n's and so is its spread.",
    _convergence,
    pair="stories-words",
)
