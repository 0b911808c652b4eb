"""Compares alignment methods at equal numbers of rollouts on prompts that no training saw.

    python benchmarks/methods.py [--budgets 64 256] [--prompts 24] [--max-tokens 96] [-m model] [-r reward]

Every method's main knob (temperature of best-of-n, sigma of the controlled ones) is tuned first, on other
prompts and at the smallest budget. Every method then sees the same prompts, seeds, rows an iteration and token
limit; the best reward at a smaller budget is that of the run's first rollouts. Printed: mean best reward with
95% bootstrap intervals over prompts, the paired difference to best-of-n, median seconds a prompt; one JSON
document on the last line.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from aisp_local import Aligner, Result

KNOBS: dict[str, tuple[str, tuple[float, ...]]] = {
    "best-of-n": ("temperature", (0.4, 0.6, 0.8, 1.0)),
    "aisp": ("sigma", (0.5, 0.7, 1.0, 1.4)),
    "aisp-held": ("sigma", (0.5, 0.7, 1.0, 1.4)),
}


def interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95% bootstrap interval of the mean over prompts."""
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, len(values), (4000, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def best_at(result: Result, budget: int, n: int) -> float:
    """Best reward of a run's first ``budget`` rollouts."""
    return max(c.reward for c in result.candidates if (c.iteration - 1) * n + c.row <= budget)


def seconds_at(result: Result, budget: int, n: int) -> float:
    """Seconds of the iterations that hold a run's first ``budget`` rollouts."""
    stats = result.iterations[: -(-budget // n)]
    return sum(s.seconds for s in stats)


def run(aligner: Aligner, prompt: str, index: int, options: argparse.Namespace, **settings: Any) -> Result:
    return aligner.chat(
        [{"role": "user", "content": prompt}],
        n=options.rows,
        max_tokens=options.max_tokens,
        seed=options.seed + index,
        **settings,
    )


def tune(aligner: Aligner, method: str, prompts: list[str], options: argparse.Namespace) -> dict[str, float]:
    """The setting of the method's knob with the highest mean best reward on the tuning prompts."""
    knob, values = KNOBS[method]
    means = {}
    for value in values:
        results = [
            run(aligner, p, i, options, method=method, budget=min(options.budgets), **{knob: value})
            for i, p in enumerate(prompts)
        ]
        means[value] = float(np.mean([result.reward for result in results]))
        print(f"{method}, {knob} {value}: {means[value]:.3f}", file=sys.stderr, flush=True)
    return {knob: max(means, key=lambda value: means[value])}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--budgets", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-m", "--model")
    parser.add_argument("-r", "--reward")
    options = parser.parse_args()
    texts = json.loads(Path(__file__).with_name("prompts.json").read_text(encoding="utf-8"))
    prompts = texts["evaluation"][: options.prompts]

    with Aligner.load(options.model, options.reward) as aligner:
        settings = {method: tune(aligner, method, texts["tuning"], options) for method in KNOBS}
        results: dict[str, list[Result]] = {method: [] for method in KNOBS}
        for i, prompt in enumerate(prompts):
            for method in KNOBS:
                results[method].append(
                    run(aligner, prompt, i, options, method=method, budget=max(options.budgets), **settings[method])
                )
            line = "  ".join(f"{method} {results[method][-1].reward:.2f}" for method in KNOBS)
            print(f"{i + 1}/{len(prompts)}  {line}", file=sys.stderr, flush=True)

    rows = []
    for budget in options.budgets:
        best = {m: np.array([best_at(r, budget, options.rows) for r in results[m]]) for m in KNOBS}
        for method in KNOBS:
            difference = best[method] - best["best-of-n"]
            rows.append(
                {
                    "budget": budget,
                    "method": method,
                    "settings": settings[method],
                    "best": float(best[method].mean()),
                    "best_95": interval(best[method]),
                    "difference": float(difference.mean()),
                    "difference_95": interval(difference),
                    "seconds": float(np.median([seconds_at(r, budget, options.rows) for r in results[method]])),
                }
            )
    print(f"{len(prompts)} prompts, at most {options.max_tokens} tokens, {options.rows} rollouts an iteration\n")
    print("| rollouts | method | tuned to | mean best reward [95%] | difference to best-of-n [95%] | seconds |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        low, high = row["best_95"]
        d_low, d_high = row["difference_95"]
        print(
            f"| {row['budget']} | {row['method']} | {' '.join(f'{k} {v}' for k, v in row['settings'].items())} "
            f"| {row['best']:.3f} [{low:.3f}, {high:.3f}] | {row['difference']:+.3f} [{d_low:+.3f}, {d_high:+.3f}] "
            f"| {row['seconds']:.1f} |"
        )
    print()
    print(json.dumps({"prompts": len(prompts), "rows": rows}))


if __name__ == "__main__":
    main()
