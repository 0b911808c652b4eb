"""What the runs of a contest say: one table a pair."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from aisp_local.bench.contest import EXACT, Run, best_at, best_so_far
from aisp_local.bench.tables import Table

Array = npt.NDArray[np.float64]

BASE, DEFAULT = "best-of-n", "score"
LEGEND = (
    "Means over prompts with Student's 95% intervals. sd: of the base model's rewards within a prompt, as best-of-n "
    "samples. KL: exact, from the model at temperature 1 and whole, of the law that the rollouts of iteration "
    f"{EXACT} are drawn from (of the first, where there is no other) and of that of the last iteration, on the first "
    "prompts (--exact-kl); beside them what the method itself counts in its last iteration. Log-likelihood: of the "
    "answers under the base model."
)
"""What the columns of ``table`` are."""

KL = (f"KL of iteration {EXACT}, nats", "of the last iteration", "of the last, as the method counts it")

_Z = 1.959964


def interval(values: Sequence[float] | Array) -> tuple[float, float, float]:
    """Mean over prompts and its 95% interval by Student's t, which so few need; those without a value (nan) are left
    out. One value has no interval (nan)."""
    kept = np.asarray(values, np.float64)
    kept = kept[np.isfinite(kept)]
    if len(kept) < 2:
        return (float(kept[0]) if len(kept) else float("nan"), float("nan"), float("nan"))
    mean, half = float(kept.mean()), student(len(kept) - 1) * float(kept.std(ddof=1)) / math.sqrt(len(kept))
    return mean, mean - half, mean + half


def student(freedom: int) -> float:
    """The 0.975 quantile of Student's t, to 0.004 (Abramowitz and Stegun 26.7.5; exact for 1 and 2)."""
    if freedom == 1:
        return math.tan(math.pi * 0.475)
    if freedom == 2:
        return 0.95 * math.sqrt(2 / (4 * 0.975 * 0.025))
    z, v = _Z, float(freedom)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / v ** (i + 1) for i, term in enumerate(terms))


def needed(runs: Sequence[Run], reward: float) -> int | None:
    """The least number of rollouts, in whole iterations, whose mean best reward is at least ``reward``.

    None if all are too few, and for a method whose answer is not the best of them. A rollout may owe its reward to all
    others of its iteration.
    """
    if runs[0].chosen:
        return None
    so_far = np.mean([best_so_far(run) for run in runs], axis=0)
    reached, n = np.flatnonzero(so_far >= reward), runs[0].n
    return min(-(-(int(reached[0]) + 1) // n) * n, len(so_far)) if len(reached) else None


def last_mean(run: Run) -> float:
    """Mean reward of the last iteration's rollouts, of those that have one."""
    values = np.array(run.rewards[-(len(run.rewards) % run.n or run.n) :], np.float64)
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else float("nan")


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
    drawn = [np.array(run.rewards)[np.isfinite(run.rewards)] for run in base]
    sd = float(np.mean([np.std(rewards) for rewards in drawn if len(rewards)]))
    middles = np.array([np.mean(rewards) if len(rewards) else np.nan for rewards in drawn])
    goal = interval(best_at(base, max(budgets)))[0]
    rows = []
    for label, runs in played.items():
        row: dict[str, Any] = {"method": label, "settings": dict(runs[0].settings), "n": runs[0].n}
        for budget in budgets:
            row[f"best_{budget}"] = interval(best_at(runs, budget))
            row[f"difference_{budget}"] = interval(best_at(runs, budget) - best_at(base, budget))
            if DEFAULT in played:
                row[f"lead_{budget}"] = interval(best_at(played[DEFAULT], budget) - best_at(runs, budget))
        row["rollouts_to_base_best"] = needed(runs, goal)
        row["ahead_of_base_best"] = {b: interval(best_at(runs, b) - best_at(base, max(budgets))) for b in budgets}
        best = mean_of(best_at(runs, max(budgets)).tolist())
        row["last_mean_sd"] = interval((np.array([last_mean(run) for run in runs]) - middles) / sd)
        row["best_sd_over_base"] = None if best is None else (best - goal) / sd
        row["kl"] = mean_of([run.kl for run in runs])
        row["exact_kl"] = mean_of([run.exact_kl for run in runs])
        row["late_kl"] = mean_of([run.late_kl for run in runs])
        row["diversity"] = float(np.mean([diversity(run.answer) for run in runs]))
        logprobs = [(run.logprob, run.answer_tokens) for run in runs if run.logprob is not None and run.answer_tokens]
        row["logprob"] = float(np.mean([total / tokens for total, tokens in logprobs])) if logprobs else None
        row["seconds"] = float(np.mean([run.seconds for run in runs]))
        row["sd"], row["base_mean"] = sd, interval(middles)[0]
        rows.append(row)
    return rows


def mean_of(values: Sequence[float | None]) -> float | None:
    """Of those there are and that are finite; None of none."""
    found = [value for value in values if value is not None and math.isfinite(value)]
    return float(np.mean(found)) if found else None


def table(pair: str, rows: Sequence[Mapping[str, Any]], budgets: Sequence[int], prompts: int) -> Table:
    """The figures for people."""
    least, most, led = min(budgets), max(budgets), f"lead_{max(budgets)}" in rows[0]
    key, name = ("lead", f"{DEFAULT}'s lead over it") if led else ("difference", f"over {BASE}")
    columns = [
        "method",
        *(f"best of {budget} [95%]" for budget in budgets),
        *(f"{name} at {budget} [95%]" for budget in budgets),
        f"rollouts to best-of-{most}",
        f"its best of {least} over best-of-{most} [95%]",
        "mean of the last iteration, sd above the base [95%]",
        *KL,
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
        made.rows.append(
            [
                titled(row["method"], row["settings"]),
                *(shown(row[f"best_{budget}"]) for budget in budgets),
                *(shown(row[f"{key}_{budget}"], sign=True) for budget in budgets),
                row["rollouts_to_base_best"] or "-",
                shown(row["ahead_of_base_best"][least], sign=True),
                shown(row["last_mean_sd"], sign=True),
                *(number(row[name], ".1f") for name in ("exact_kl", "late_kl", "kl")),
                f"{row['diversity']:.2f}",
                number(row["logprob"]),
                f"{row['seconds']:.1f}",
            ]
        )
    return made


def titled(method: str, settings: Mapping[str, float]) -> str:
    """A method with its settings, as the first cell of a row."""
    named = ", ".join(f"{name.rstrip('_')} {value:.3g}" for name, value in settings.items())
    return f"{method} ({named})" if named else method


def number(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None or not math.isfinite(value) else format(value, form)


def shown(values: tuple[float, float, float], sign: bool = False) -> str:
    if np.isnan(values[0]):
        return "-"
    form = "{:+.2f}" if sign else "{:.2f}"
    if np.isnan(values[1]):  # of one prompt
        return form.format(values[0])
    return f"{form.format(values[0])} [{form.format(values[1])}, {form.format(values[2])}]"
