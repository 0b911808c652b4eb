"""How rollouts are best spent: how many, and in iterations of which size."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np

from aisp_local.bench.contest import whole
from aisp_local.bench.contest_report import interval, number, shown
from aisp_local.bench.experiments.lab import SETTINGS, Experiment, Finding, Lab, best_of, mean, rewards, row
from aisp_local.bench.tables import Table
from aisp_local.svg import Axes
from aisp_local.timeline import OFF, Timeline

_METHODS, _N = ("score", "aisp", "best-of-n"), 32


def _samples(lab: Lab) -> Finding:
    budget = lab.size(1024, 64)
    sizes = [2**k for k in range(5, 11) if 2**k <= budget]  # whole iterations
    best = {}
    for method in _METHODS:
        found = rewards(lab.search(method, budget, _N, **SETTINGS.get(method, {})))
        best[method] = np.fmax.accumulate(found, axis=1)
    curves = {method: mean(so_far, 0) for method, so_far in best.items()}
    made = Table("samples", f"Mean best reward, {len(lab.prompts)} prompts", ["method", *map(str, sizes)])
    made.rows.extend([row(method), *(number(curve[s - 1]) for s in sizes)] for method, curve in curves.items())
    ahead = Table("samples-ahead", "The same over best-of-n's [95%]", ["method", *map(str, sizes)])
    leads = {}
    for method in _METHODS[:-1]:
        over = best[method] - best["best-of-n"]
        leads[method] = {size: interval(over[:, size - 1]) for size in sizes}
        ahead.rows.append([method, *(shown(lead, sign=True) for lead in leads[method].values())])
    needs = Table("samples-needed", "Rollouts to what best-of-n has with N", ["method", *(f"N = {s}" for s in sizes)])
    for method in _METHODS[:-1]:
        needed = []
        for size in sizes:
            reached = np.flatnonzero(curves[method] >= curves["best-of-n"][size - 1])
            # Of an iteration a rollout may owe its reward to all others.
            needed.append(str(-(-(int(reached[0]) + 1) // _N) * _N) if len(reached) else f"more than {budget}")
        needs.rows.append([method, *needed])
    plotted = np.concatenate([curve[_N - 1 :] for curve in curves.values()])
    plotted = plotted[np.isfinite(plotted)]
    axes = Axes(
        "best reward so far",
        (math.log2(_N), math.log2(budget), "log2 of the rollouts"),
        (float(plotted.min()), float(plotted.max()), "mean over prompts"),
    )
    for i, curve in enumerate(curves.values()):
        points = [(math.log2(k), float(curve[k - 1])) for k in range(_N, budget + 1, _N)]
        axes.curve([point for point in points if math.isfinite(point[1])], i)
    axes.legend(list(curves))
    data = {method: {size: float(curve[size - 1]) for size in sizes} for method, curve in curves.items()}
    return Finding([made, ahead, needs], {"curves": axes.svg()}, {"best": data, "over best-of-n": leads})


SAMPLES = Experiment(
    "samples",
    "How many rollouts does each method need for the reward that best-of-n has with N?",
    "best-of-n grows with log N; aisp runs beside it; score, which selects unfinished rollouts and steers, is ahead "
    "from its first iteration on, by a lead that shrinks as all near the best that the reward can give.",
    _samples,
)


def _batched(lab: Lab) -> Finding:
    """One batch of all prompts at small n against each prompt alone, and both methods at the same rollouts."""
    made = Table(
        "batched",
        f"{len(lab.prompts)} prompts, {lab.size(32, 8)} rollouts each; steps: of the engine, one after another",
        [
            "method",
            "n",
            "iterations",
            "prompts at once",
            "best reward [95%]",
            "steps",
            "tokens decoded",
            "texts scored",
            "seconds",
        ],
    )
    data, budget = [], lab.size(32, 8)
    ways = [(n, together) for n in (budget // 4, budget) for together in (True, False)]
    for method in ("aisp", "best-of-n", "score"):
        for n, together in ways:
            timeline = Timeline()
            engine: Any = lab.aligner.engine
            engine.timeline = timeline
            try:
                began = time.perf_counter()
                results = lab.aligner.generate_many(
                    lab.prompts,
                    method=method,
                    budget=budget,
                    n=n,
                    max_tokens=lab.max_tokens,
                    seed=lab.seed,
                    at_once=None if together else 1,
                    **SETTINGS.get(method, {}),
                )
                seconds = time.perf_counter() - began
            finally:
                engine.timeline = OFF
            found = [whole(result) for result in results]
            best = interval([result.reward for result in found])
            steps = sum(event.get("name") == "decode" for event in timeline.events())
            tokens, scored = sum(r.n_tokens for r in found), sum(s.n_scored for r in found for s in r.iterations)
            at_once = len(lab.prompts) if together else 1
            made.rows.append(
                [row(method), n, budget // n, at_once, shown(best), steps, tokens, scored, f"{seconds:.1f}"]
            )
            spent = {"steps": steps, "tokens": tokens, "scored": scored, "seconds": seconds}
            data.append({"method": method, "n": n, "at_once": at_once, "best": best, **spent})
            lab.say(f"{method}, n = {n}, {at_once} at once")
    return Finding([made], data=data)


BATCHED = Experiment(
    "batched",
    "Many prompts at once with a small n each: does that buy back what sequential iterations cost?",
    "one batch of all prompts takes fewer steps, one after the other, than each prompt alone, so that small "
    "iterations cost no more time than large ones; at equal rollouts and tokens aisp is then as fast as best-of-n, and "
    "what it gains by iterating is little, since few iterations of few rollouts learn little. score reads more and "
    "gains more.",
    _batched,
)


def _product(lab: Lab) -> Finding:
    budget = lab.size(256, 16)
    sizes = [n for n in (4, 8, 16, 32, 64, 128) if n < budget]
    made = Table(
        "product",
        f"{budget} rollouts in iterations of n, {len(lab.prompts)} prompts, one after another",
        ["method", "n", "iterations", "best reward [95%]", "mean of the last iteration [95%]", "seconds a prompt"],
    )
    data = []
    for method in ("score", "aisp"):
        for n in sizes:
            began = time.perf_counter()
            found = rewards(lab.search(method, budget, n, at_once=1))  # seconds that somebody waits
            seconds = (time.perf_counter() - began) / len(lab.prompts)
            best, end = interval(best_of(found)), interval(mean(found[:, -n:], 1))
            made.rows.append([method, n, budget // n, shown(best), shown(end), f"{seconds:.2f}"])
            data.append({"method": method, "n": n, "best": best, "last": end, "seconds": seconds})
    return Finding([made], data=data)


PRODUCT = Experiment(
    "product",
    "The same number of rollouts: few large iterations or many small ones?",
    "large iterations decode faster (one batch) and let score select among more; many small ones learn more often. The "
    "best n is in between, and time falls with n until the processor is full.",
    _product,
)
