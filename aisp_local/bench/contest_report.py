"""What the runs of a contest say: one table a pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from aisp_local.bench.contest import Run, best_at
from aisp_local.bench.tables import Table

Array = npt.NDArray[np.float64]

BASE, DEFAULT = "best-of-n", "score"
_DRAWS = 4000


def interval(values: Sequence[float] | Array) -> tuple[float, float, float]:
    """Mean over prompts and its 95% bootstrap interval; those without a value (nan) are left out."""
    kept = np.asarray(values, np.float64)
    kept = kept[np.isfinite(kept)]
    if not len(kept):
        return (float("nan"),) * 3
    rng = np.random.default_rng(0)
    means = kept[rng.integers(0, len(kept), (_DRAWS, len(kept)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(kept.mean()), float(low), float(high)


def needed(runs: Sequence[Run], reward: float) -> int | None:
    """The least number of rollouts, in whole iterations, whose mean best reward is at least ``reward``.

    None if all are too few, and for a method whose answer is not the best of them. A rollout may owe its reward to all
    others of its iteration.
    """
    if runs[0].chosen:
        return None
    so_far = np.mean([np.maximum.accumulate(run.rewards) for run in runs], axis=0)
    reached, n = np.flatnonzero(so_far >= reward), runs[0].n
    return min(-(-(int(reached[0]) + 1) // n) * n, len(so_far)) if len(reached) else None


def last_mean(run: Run) -> float:
    """Mean reward of the last iteration's rollouts."""
    return float(np.mean(run.rewards[-run.n :]))


def diversity(text: str) -> float:
    """Product over n = 2, 3, 4 of the share of n-grams of words that are different."""
    words, product = text.split(), 1.0
    for n in (2, 3, 4):
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        product *= len(set(grams)) / len(grams) if grams else 1.0
    return product


def summary(played: Mapping[str, Sequence[Run]], budgets: Sequence[int]) -> list[dict[str, Any]]:
    """One entry of figures for each method; ``sd`` is the base model's spread within a prompt, as best-of-n samples."""
    base = played[BASE]
    sd = float(np.mean([np.std(run.rewards) for run in base]))
    middle = float(np.mean([np.mean(run.rewards) for run in base]))
    goal = float(best_at(base, max(budgets)).mean())
    rows = []
    for label, runs in played.items():
        row: dict[str, Any] = {"method": label, "settings": dict(runs[0].settings), "n": runs[0].n}
        for budget in budgets:
            row[f"best_{budget}"] = interval(best_at(runs, budget))
            row[f"difference_{budget}"] = interval(best_at(runs, budget) - best_at(base, budget))
            if DEFAULT in played:
                row[f"lead_{budget}"] = interval(best_at(played[DEFAULT], budget) - best_at(runs, budget))
        row["rollouts_to_base_best"] = needed(runs, goal)
        row["last_mean_sd"] = (float(np.nanmean([last_mean(run) for run in runs])) - middle) / sd
        row["best_sd_over_base"] = (float(best_at(runs, max(budgets)).mean()) - goal) / sd
        row["kl"] = mean_of([run.kl for run in runs])
        row["exact_kl"] = mean_of([run.exact_kl for run in runs])
        row["diversity"] = float(np.mean([diversity(run.answer) for run in runs]))
        logprobs = [(run.logprob, run.answer_tokens) for run in runs if run.logprob is not None and run.answer_tokens]
        row["logprob"] = float(np.mean([total / tokens for total, tokens in logprobs])) if logprobs else None
        row["seconds"] = float(np.mean([run.seconds for run in runs]))
        row["sd"], row["base_mean"] = sd, middle
        rows.append(row)
    return rows


def mean_of(values: Sequence[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return float(np.mean(found)) if found else None


def table(pair: str, rows: Sequence[Mapping[str, Any]], budgets: Sequence[int], prompts: int) -> Table:
    """The figures for people."""
    most, led = max(budgets), f"lead_{max(budgets)}" in rows[0]
    key, name = ("lead", f"{DEFAULT}'s lead over it") if led else ("difference", f"over {BASE}")
    columns = [
        "method",
        *(f"best of {budget} [95%]" for budget in budgets),
        *(f"{name} at {budget} [95%]" for budget in budgets),
        f"rollouts to best-of-{most}",
        "mean of the last iteration, sd above the base",
        "KL of the second iteration, nats (truncation included)",
        "diversity",
        "log-likelihood a token",
        "seconds",
    ]
    made = Table(
        f"contest-{pair}",
        f"{pair}: {prompts} prompts; the base has mean {rows[0]['base_mean']:.2f} and sd {rows[0]['sd']:.2f}",
        columns,
    )
    for row in rows:
        settings = ", ".join(f"{name.rstrip('_')} {value:.3g}" for name, value in row["settings"].items())
        kl = row["exact_kl"] if row["exact_kl"] is not None else row["kl"]
        made.rows.append(
            [
                f"{row['method']} ({settings})" if settings else row["method"],
                *(shown(row[f"best_{budget}"]) for budget in budgets),
                *(shown(row[f"{key}_{budget}"], sign=True) for budget in budgets),
                row["rollouts_to_base_best"] or "-",
                f"{row['last_mean_sd']:+.2f}",
                "-" if kl is None else f"{kl:.1f}",
                f"{row['diversity']:.2f}",
                "-" if row["logprob"] is None else f"{row['logprob']:.2f}",
                f"{row['seconds']:.1f}",
            ]
        )
    return made


def shown(values: tuple[float, float, float], sign: bool = False) -> str:
    if np.isnan(values[0]):
        return "-"
    form = "{:+.2f}" if sign else "{:.2f}"
    return f"{form.format(values[0])} [{form.format(values[1])}, {form.format(values[2])}]"
