"""What a contest says to somebody who chooses a method: at equal rollouts, at equal time, and at what price."""

from __future__ import annotations

import html
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from aisp_local.bench.contest import Pair, Run, best_at, best_so_far
from aisp_local.bench.contest_plot import curves
from aisp_local.bench.contest_report import (
    BASE,
    KL,
    diversity,
    interval,
    last_mean,
    mean_of,
    needed,
    number,
    shown,
    titled,
)
from aisp_local.bench.tables import Table
from aisp_local.errors import InputError
from aisp_local.files import write_output
from aisp_local.finite import finite
from aisp_local.webpage import html_document, html_table

Array = npt.NDArray[np.float64]
Played = Mapping[str, Sequence[Run]]

_EXACT = 14  # prompts up to which every pattern of signs is gone through
_DRAWS = 20_000
_SHOWN = 3  # prompts whose answers the page shows
_LEGEND = (
    "Means over prompts with Student's 95% intervals; p: of sign flips, corrected for the number of methods (Holm), at "
    f"the most rollouts; intervals elsewhere are not corrected. {BASE} is the best of its settings on these very "
    "prompts, so that what is ahead of it is further ahead, and what is behind it less so, than intervals and p say. "
    "Time: of each prompt, of which four share a batch; '-' in it: no iteration had ended. A method of fewer rollouts "
    "stands there with what it had, though it would have had time for more. KL: exact, of the law that the rollouts of "
    "that iteration are drawn from, on the first prompts. Coherence: the mean log-likelihood a token, under the base "
    "model, of the 16 tokens in a row of the answer that are least likely."
)


@dataclass(frozen=True)
class Report:
    """The figures of one pair: ``rows`` for machines, ``tables`` for people, and the answers that a page shows."""

    pair: Pair
    rows: list[dict[str, Any]]
    tables: list[Table]
    plot: str
    answers: list[dict[str, Any]]  # the counted ones: prompt, method, answer, reward, judge, and rewards by budget


def p_value(differences: Sequence[float] | Array) -> float:
    """Two-sided, of paired differences whose signs would be chance: the share of sign patterns whose mean is as far
    from 0. All patterns for up to 14 pairs, else so many drawn ones and this one. Pairs without a difference (nan) are
    left out; nan if there are no others."""
    d = np.asarray(differences, np.float64)
    d = d[np.isfinite(d)]
    if not len(d):
        return float("nan")
    if not np.any(d):
        return 1.0
    if len(d) <= _EXACT:
        signs = np.array(list(itertools.product((-1.0, 1.0), repeat=len(d))))
    else:
        signs = np.random.default_rng(0).choice([-1.0, 1.0], (_DRAWS, len(d)))
    reached = np.abs(signs @ d) >= abs(d.sum()) - 1e-9 * np.abs(d).sum()
    drawn = len(d) > _EXACT
    return float((reached.sum() + drawn) / (len(reached) + drawn))


def holm(p: Sequence[float]) -> list[float]:
    """p-values of several comparisons, corrected so that all of them together err as often as one would (Holm 1979)."""
    corrected, worst = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        worst = max(worst, min(1.0, (len(p) - rank) * p[i]))
        corrected[i] = worst
    return corrected


def win_rate(a: Array, b: Array) -> float:
    """Share of prompts on which a is above b; ties count half."""
    return float((a > b).mean() + (a == b).mean() / 2)


def best_by(runs: Sequence[Run], seconds: Sequence[float]) -> Array:
    """Best reward of the iterations that each run had finished by its time; nan where there was none, and for a method
    whose answer is not the best of its rollouts."""
    found = []
    for run, deadline in zip(runs, seconds, strict=True):
        done = int(np.searchsorted(run.clock, deadline * (1 + 1e-9), side="right"))
        found.append(float(best_so_far(run)[: done * run.n][-1]) if done and not run.chosen else float("nan"))
    return np.array(found)


def _in_time(values: Array) -> tuple[float, float, float]:
    """Nothing where one of the prompts had nothing by then: the others would be a choice of prompts."""
    return interval(values if np.isfinite(values).all() else [])


def _judged(runs: Sequence[Run], budget: int) -> Array | None:
    values = [run.judged.get(str(budget)) for run in runs]
    return None if None in values else np.array(values, np.float64)


def report(pair: Pair, played: Played, budgets: Sequence[int]) -> Report:
    """All figures of a pair; best-of-n is among its methods. Raises InputError for runs without times."""
    if not all(run.clock for runs in played.values() for run in runs):
        raise InputError(f"runs of {pair.name} were kept by an older version, without times; give another folder")
    base, most = played[BASE], max(budgets)
    sizes = [2**k for k in range(4, 11) if 2**k <= most]
    goals = {size: interval(best_at(base, size))[0] for size in sizes}
    # Seconds that best-of-n takes for so many rollouts of each prompt.
    times = {b: [run.clock[min(len(run.clock), -(-b // run.n)) - 1] for run in base] for b in budgets}
    others = [label for label in played if label != BASE]
    rows: list[dict[str, Any]] = []
    for label, runs in played.items():
        ahead = best_at(runs, most) - best_at(base, most)
        capped = len(runs[0].rewards) < most  # it was not given the rollouts of the others
        by_time = {b: best_by(runs, times[b]) for b in budgets}
        judged, base_judged = _judged(runs, most), _judged(base, most)
        rows.append(
            {
                "method": label,
                "settings": dict(runs[0].settings),
                "n": runs[0].n,
                "rollouts": len(runs[0].rewards),
                "best": {b: interval(best_at(runs, b)) for b in budgets},
                "ahead": {b: interval(best_at(runs, b) - best_at(base, b)) for b in budgets},
                "p": p_value(ahead) if label in others and not capped else None,
                "wins": win_rate(best_at(runs, most), best_at(base, most)),
                "by_time": {b: _in_time(by_time[b]) for b in budgets},
                "ahead_by_time": {b: _in_time(by_time[b] - best_by(base, times[b])) for b in budgets},
                "rollouts_to": {size: needed(runs, goal) for size, goal in goals.items()},
                "mean_last": mean_of([last_mean(run) for run in runs]),
                "judge": None if judged is None else interval(judged),
                "judge_wins": None if judged is None or base_judged is None else win_rate(judged, base_judged),
                "kl": mean_of([run.exact_kl for run in runs]),
                "late_kl": mean_of([run.late_kl for run in runs]),
                "counted_kl": mean_of([run.kl for run in runs]),
                "diversity": float(np.mean([diversity(run.answer) for run in runs])),
                "logprob": mean_of([run.logprob / run.answer_tokens for run in runs if run.logprob is not None]),
                "low_logprob": mean_of([run.low_logprob for run in runs]),
                "seconds": float(np.mean([run.clock[-1] for run in runs])),
                "tokens": float(np.mean([run.n_tokens for run in runs])),
                "scored": float(np.mean([run.n_scored for run in runs])),
            }
        )
    compared = [row for row in rows if row["p"] is not None and np.isfinite(row["p"])]
    corrected = dict(zip(map(id, compared), holm([row["p"] for row in compared]), strict=True))
    for row in rows:
        row["p_holm"] = corrected.get(id(row))
    return Report(
        pair,
        rows,
        _tables(pair, rows, budgets, {b: float(np.mean(seconds)) for b, seconds in times.items()}, goals),
        curves(pair.name, played),
        _answers(pair, played, budgets),
    )


def _tables(
    pair: Pair,
    rows: Sequence[Mapping[str, Any]],
    budgets: Sequence[int],
    times: Mapping[int, float],
    goals: Mapping[int, float],
) -> list[Table]:
    most, name = max(budgets), pair.name
    reward = Table(
        f"{name}-rollouts",
        f"{name}: reward at equal numbers of rollouts ({len(pair.evaluation)} prompts)",
        [
            "method",
            *(f"best of {b} [95%]" for b in budgets),
            *(f"over {BASE} at {b} [95%]" for b in budgets),
            f"p, corrected, at {most}",
            f"wins at {most}",
            "mean of the last iteration",
        ],
    )
    time = Table(
        f"{name}-time",
        f"{name}: reward in the time that {BASE} takes",
        [
            "method",
            *(f"in {times[b]:.1f} s, its {b} [95%]" for b in budgets),
            *(f"over {BASE} in {times[b]:.1f} s [95%]" for b in budgets),
            f"seconds for {most}",
            "tokens decoded",
            "texts scored",
        ],
    )
    needs = Table(
        f"{name}-needed",
        f"{name}: rollouts to the mean best reward that {BASE} has with N",
        ["method", *(f"N = {size}: {goal:.2f}" for size, goal in goals.items())],
    )
    price = Table(
        f"{name}-price",
        f"{name}: the answers of {most} rollouts",
        [
            "method",
            "judge [95%]",
            "judge's wins",
            *KL,
            "diversity",
            "log-likelihood a token",
            "coherence",
        ],
    )
    for row in rows:
        label = titled(row["method"], row["settings"])
        if row["rollouts"] < most:
            label += f", {row['rollouts']} rollouts"
        best, by_time = row["best"], row["by_time"]
        reward.rows.append(
            [
                label,
                *(shown(best[b]) for b in budgets),
                *(shown(row["ahead"][b], sign=True) for b in budgets),
                "-" if row["p_holm"] is None else "< 0.001" if row["p_holm"] < 0.001 else f"{row['p_holm']:.3f}",
                f"{100 * row['wins']:.0f}%",
                "-" if row["mean_last"] is None else f"{row['mean_last']:.2f}",
            ]
        )
        time.rows.append(
            [
                label,
                *(shown(by_time[b]) for b in budgets),
                *(shown(row["ahead_by_time"][b], sign=True) for b in budgets),
                f"{row['seconds']:.1f}",
                f"{row['tokens']:.0f}",
                f"{row['scored']:.0f}",
            ]
        )
        needs.rows.append([label, *(str(row["rollouts_to"][size] or f"more than {row['rollouts']}") for size in goals)])
        price.rows.append(
            [
                label,
                "-" if row["judge"] is None else shown(row["judge"]),
                "-" if row["judge_wins"] is None else f"{100 * row['judge_wins']:.0f}%",
                *(number(row[name], ".1f") for name in ("kl", "late_kl", "counted_kl")),
                f"{row['diversity']:.2f}",
                number(row["logprob"]),
                number(row["low_logprob"]),
            ]
        )
    return [reward, time, needs, price]


def _answers(pair: Pair, played: Played, budgets: Sequence[int]) -> list[dict[str, Any]]:
    most, found = max(budgets), []
    for i, prompt in enumerate(pair.evaluation):
        for label, runs in played.items():
            rewards = {budget: float(best_at([runs[i]], budget)[0]) for budget in budgets}
            told = {"prompt": prompt, "method": label, "answer": runs[i].answer, "reward": rewards[most]}
            found.append(told | {"judge": runs[i].judged.get(str(most)), "rewards": rewards})
    return found


def page(title: str, about: str, reports: Sequence[Report], command: str) -> str:
    """A web page that needs nothing else. Texts of models are escaped."""
    parts = [f"<p>{html.escape(about)}</p>", f"<p>Made again by <code>{html.escape(command)}</code>.</p>"]
    parts += [f"<p>{html.escape(_LEGEND)}</p>"]
    for each in reports:
        pair = each.pair
        parts.append(f"<h2>{html.escape(pair.name)}</h2><p>{html.escape(_about(pair))}</p>{each.plot}")
        for each_table in each.tables:
            parts += [f"<h3>{html.escape(each_table.title)}</h3>", html_table(each_table.columns, each_table.rows)]
        for prompt in pair.evaluation[:_SHOWN]:
            parts.append(f"<h3>{html.escape(prompt)}</h3>")
            for told in (one for one in each.answers if one["prompt"] == prompt):
                said = f"{told['method']}: reward {told['reward']:.2f}"
                said += "" if told["judge"] is None else f", judge {told['judge']:.2f}"
                parts.append(f"<p>{html.escape(said)}</p><blockquote>{html.escape(told['answer'])}</blockquote>")
    return html_document(title, parts)


def _about(pair: Pair) -> str:
    judge = "" if pair.judge is None else f", judged by {Path(pair.judge).name}"
    return f"{Path(pair.model).name} rewarded by {Path(pair.reward).name}{judge}, at most {pair.max_tokens} tokens"


def write(
    out: Path, asked: Mapping[str, Any], machine: Mapping[str, Any], reports: Sequence[Report], command: str
) -> str:
    """quality.md, quality.html and quality.json in a folder, each whole; gives the Markdown. ``asked`` of all pairs;
    ``command`` makes them again."""
    about = ", ".join(f"{name} {value}" for name, value in {**machine, **asked}.items())
    text = f"{about}\n\nMade again by `{command}`.\n\n{_LEGEND}\n"
    for each in reports:
        tables = "\n".join(table.markdown() for table in each.tables)
        text += f"\n## {each.pair.name}\n\n{_about(each.pair)}.\n\n{tables}"
    write_output(out / "quality.md", text)
    write_output(out / "quality.html", page("Alignment methods, compared", about, reports, command))
    pairs = [
        {
            "name": each.pair.name,
            "model": Path(each.pair.model).name,
            "reward": Path(each.pair.reward).name,
            "judge": None if each.pair.judge is None else Path(each.pair.judge).name,
            "max_tokens": each.pair.max_tokens,
            "rows": each.rows,
            "answers": each.answers,
        }
        for each in reports
    ]
    content = {"machine": dict(machine), "asked": dict(asked), "command": command, "pairs": pairs}
    write_output(out / "quality.json", json.dumps(finite(content), indent=1) + "\n")
    return text
