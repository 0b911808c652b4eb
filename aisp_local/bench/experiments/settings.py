"""What the published method's settings do: lambda, sigma, alpha, the window."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from aisp_local.bench.contest_report import interval, number, shown
from aisp_local.bench.experiments.lab import (
    Experiment,
    Finding,
    Lab,
    best_of,
    last,
    mean,
    rewards,
    spread_of,
    variety,
)
from aisp_local.bench.tables import Table
from aisp_local.controllers import Aisp
from aisp_local.svg import heat_map
from aisp_local.types import Rollouts

_N = 16


def _figures(lab: Lab, iterations: int, **options: Any) -> dict[str, Any]:
    """Of the published method with these options."""
    results = lab.search("aisp", _N * iterations, _N, kl=True, **options)
    found = rewards(results)
    return {
        "best": float(mean(best_of(found))),
        "best_interval": interval(best_of(found)),
        "first": float(mean(found[:, :_N])),
        "spread": float(mean(spread_of(found[:, :_N]))),
        "last": float(mean(found[:, -_N:])),
        "kl": last(results, lambda s: s.kl),
        "ess": last(results, lambda s: s.ess),
        "norm": last(results, lambda s: s.control_norm),
        "variety": variety(results),
    }


def _sweep(name: str, title: str, knob: str, values: list[tuple[str, dict[str, Any]]]) -> Table:
    columns = [knob, "best reward [95%]", "mean of the first", "mean of the last iteration", "its KL, nats"]
    made = Table(name, title, [*columns, "effective sample size", "norm of U", "variety of the last"])
    for label, f in values:
        figures = [shown(f["best_interval"]), number(f["first"]), number(f["last"])]
        made.rows.append(
            [
                label,
                *figures,
                number(f["kl"], ".1f"),
                number(f["ess"], ".1f"),
                number(f["norm"], ".1f"),
                number(f["variety"]),
            ]
        )
    return made


def _lambda(lab: Lab) -> Finding:
    values = [(f"{x:g}", _figures(lab, lab.size(8, 2), lambda_=x)) for x in lab.some((0.1, 0.3, 1.0, 3.0, 10.0))]
    title = f"aisp, {lab.size(8, 2)} iterations of {_N}, means over {len(lab.prompts)} prompts"
    return Finding([_sweep("lambda", title, "lambda", values)], data=dict(values))


LAMBDA = Experiment(
    "lambda",
    "How does lambda trade reward against distance from the base model?",
    "a small lambda follows few rollouts (small effective sample size, larger |U| and KL); a large one averages noise "
    "away and stays near the base. In T d directions sixteen rollouts say little, so the mean reward hardly moves "
    "either way, and most of the KL is that of the noise itself.",
    _lambda,
)


def _map(lab: Lab) -> Finding:
    lambdas, sigmas = lab.some((0.03, 0.1, 0.3, 1.0, 3.0)), lab.some((0.25, 0.5, 1.0, 2.0, 4.0))
    iterations = lab.size(6, 2)
    grid = {(x, s): _figures(lab, iterations, lambda_=x, sigma=s) for x in lambdas for s in sigmas}
    plots, tables = {}, []
    for key, title in (
        ("last", "mean reward of the last iteration"),
        ("kl", "its KL, nats"),
        ("variety", "variety of its answers"),
        ("ess", "effective sample size"),
    ):
        cells = [[grid[x, s][key] for s in sigmas] for x in lambdas]
        # Collapsed: a standard deviation below where the least noise begins.
        calm = grid[lambdas[-1], sigmas[0]]
        marked = [[grid[x, s]["last"] < calm["first"] - calm["spread"] for s in sigmas] for x in lambdas]
        names = [f"{x:g}" for x in lambdas], [f"{s:g}" for s in sigmas]
        plots[key] = heat_map(f"aisp: {title}", ("lambda", names[0]), ("sigma", names[1]), cells, marked)
        over = f"means over {len(lab.prompts)} prompts; rows: lambda, columns: sigma"
        table = Table(f"map-{key}", f"{title} ({over})", ["", *names[1]])
        for name, row in zip(names[0], cells, strict=True):
            table.rows.append([name, *(number(c, ".1f" if key == "kl" else ".2f") for c in row)])
        tables.append(table)
    data = [{"lambda": x, "sigma": s, **figures} for (x, s), figures in grid.items()]
    return Finding(tables, plots, data)


MAP = Experiment(
    "map",
    "Where do the answers collapse as lambda and sigma grow?",
    "sigma decides: above about 1 the noise pushes decoding off the model's text (KL up, reward down), and answers "
    "lose variety where noise of a step picks the same few tokens; lambda matters far less. Framed: the mean "
    "reward of the last iteration is a standard deviation below that of the first with the least noise.",
    _map,
    prompts=2,
)


def _window(lab: Lab) -> Finding:
    iterations, t = lab.size(8, 2), lab.max_tokens
    alphas = [(f"alpha {a:g}", _figures(lab, iterations, alpha=a)) for a in lab.some((0.0, 0.9, 0.99, 0.999, 1.0))]
    windows = [
        (f"window {w:g}", _figures(lab, iterations, window=int(w))) for w in lab.some((max(1, t // 12), t // 3, t))
    ]
    title = f"aisp, {iterations} iterations of {_N}, means over {len(lab.prompts)} prompts"
    return Finding(
        [_sweep("window", title, "setting", [*alphas, *windows]), _numerics()], data=dict([*alphas, *windows])
    )


def _numerics() -> Table:
    """The update under rewards and lambdas far outside what makes sense."""
    made = Table(
        "numerics",
        "The update by itself: everything finite?",
        ["rewards", "lambda", "norm of U", "finite", "a softmax without log-sum-exp"],
    )
    for scale in (1.0, 1e6, 1e30):
        for lambda_ in (1.0, 1e-6, 1e-300):
            controller = Aisp(d=8, max_tokens=4, seed=0, lambda_=lambda_, alpha=0.999)
            for _ in range(3):
                controller.ask(6)
                tokens = [np.zeros(4, np.int32)] * 6
                told = np.linspace(-1.0, 1.0, 6) * scale
                controller.tell(Rollouts(tokens, [""] * 6, ["length"] * 6, 0.0, 0), told)
            with np.errstate(all="ignore"):
                naive = np.exp(told / lambda_)
                works = bool(np.isfinite(naive / naive.sum()).all())
            finite = bool(np.isfinite(controller.mean).all())
            norm = float(np.linalg.norm(controller.mean))
            made.rows.append(
                [
                    f"-1 to 1 times {scale:g}",
                    f"{lambda_:g}",
                    f"{norm:.2f}",
                    "yes" if finite else "no",
                    "works" if works else "fails",
                ]
            )
            assert finite or math.isnan(norm)
    return made


WINDOW = Experiment(
    "window",
    "What do alpha and the control window change, and does anything overflow?",
    "alpha below 1 pulls U back, visibly only far below 1; a short window steers the beginning alone and costs less "
    "KL; the update stays finite for every lambda and reward, where a softmax written down as it stands does not.",
    _window,
)
