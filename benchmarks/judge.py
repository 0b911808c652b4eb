"""Whether a search that raises a reward also raises what another one, the judge, thinks of the answers.

    python benchmarks/judge.py [REWARD [JUDGE]] [--prompts 24] [--budgets 4 16 64 256] [--strong 512] [--markdown]

REWARD and JUDGE are folders, TOML files or names; by default the shipped reward and the shipped judge.
Three parts, on prompts that no training saw:

1. How far the two agree on responses of the base model to one prompt.
2. What best-of-n and aisp-held, at equal numbers of rollouts, do to both: the best reward, and the judge's score of
   that same winner, in standard deviations of the base model's responses to one prompt. A reward that is hacked goes
   on rising while the judge stalls or falls. Winners of fewer rollouts are means over the parts of one run of
   best-of-n, and the beginning of one run of aisp-held.
3. The winners whose reward rose while the judge's score fell most, in full.

Base statistics come from responses of their own, which no search has. Intervals are 95% by bootstrap over prompts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aisp_local import Aligner, Result, shipped
from aisp_local.bench.contest import prompt_sets
from aisp_local.bench.contest_report import interval
from aisp_local.engine import Engine
from aisp_local.files import check_output, write_output
from aisp_local.measure import calibrated
from aisp_local.reward_kit.statistics import spearman
from aisp_local.rewards import Reward, load_reward

METHODS = ("best-of-n", "aisp-held")
BASE = {"method": "best-of-n", "temperature": 0.7}


def kendall(a: np.ndarray, b: np.ndarray) -> float:
    """Kendall's tau-b; nan where one of them does not vary."""
    signs = [np.sign(x[:, None] - x)[np.triu_indices(len(x), 1)] for x in (a, b)]
    norm = float(np.sqrt((signs[0] ** 2).sum() * (signs[1] ** 2).sum()))
    return float((signs[0] * signs[1]).sum()) / norm if norm > 0 else float("nan")


def agreement(a: np.ndarray, b: np.ndarray) -> float:
    """Share of the pairs that both order alike; a tie of either counts half."""
    rows = np.triu_indices(len(a), 1)
    return float((1 + np.sign(a[:, None] - a)[rows] * np.sign(b[:, None] - b)[rows]).mean() / 2)


def rows_of(result: Result, rows: int) -> list[dict[str, Any]]:
    """The candidates with both scores, in the order in which they were drawn."""
    drawn = sorted(result.candidates, key=lambda c: (c.iteration, c.row))
    return [
        {"at": (c.iteration - 1) * rows + c.row, "reward": c.reward, "judge": c.judge, "text": c.text}
        for c in drawn
        if np.isfinite(c.reward) and c.judge is not None and np.isfinite(c.judge)
    ]


def winners(drawn: Sequence[dict[str, Any]], budget: int, total: int, *, parts: bool) -> list[dict[str, Any]]:
    """The best of the first ``budget`` rollouts; with ``parts``, of every ``budget`` of them in turn."""
    starts = range(0, total - budget + 1, budget) if parts else (0,)
    found = []
    for start in starts:
        block = [row for row in drawn if start < row["at"] <= start + budget]
        if block:
            found.append(max(block, key=lambda row: row["reward"]))
    return found


def measure(
    engine: Engine, reward: Reward, judge: Reward, prompts: Sequence[str], options: argparse.Namespace
) -> dict[str, Any]:
    """The figures of all three parts; scores are as the reward and the judge give them, calibrated on each prompt."""
    top = max(options.budgets)
    strong = max(options.strong, top)
    budgets = {"best-of-n": sorted(options.budgets), "aisp-held": sorted({*options.budgets, strong})}
    found = []
    for i, text in enumerate(prompts):
        prompt = [{"role": "user", "content": text}]
        known = {"max_tokens": options.max_tokens, "seed": options.seed, "prompt_index": i}
        aligner = Aligner(
            engine,
            calibrated(engine, reward, prompt, **known),
            judge=calibrated(engine, judge, prompt, **known),
        )

        common = {"n": options.rows, "max_tokens": options.max_tokens, "prompt_index": i, "judge_all": True}
        runs = {
            "base": aligner.chat(prompt, budget=options.rollouts, seed=options.seed, **common, **BASE),
            "best-of-n": aligner.chat(prompt, budget=top, seed=options.seed + 1, **common, **BASE),
            "aisp-held": aligner.chat(prompt, budget=strong, seed=options.seed + 1, **common, method="aisp-held"),
        }
        drawn = {name: rows_of(result, min(options.rows, result.budget)) for name, result in runs.items()}
        best = {
            method: {n: winners(drawn[method], n, top, parts=method == "best-of-n") for n in budgets[method]}
            for method in METHODS
        }
        found.append({"prompt": text, "base": drawn["base"], "best": best})
        print(f"{i + 1}/{len(prompts)}", file=sys.stderr, flush=True)
    return summary(reward.name, judge.name, found, budgets, options)


def summary(
    reward: str, judge: str, found: Sequence[Mapping[str, Any]], budgets: Mapping[str, list[int]], options: Any
) -> dict[str, Any]:
    base = [{key: np.array([row[key] for row in one["base"]]) for key in ("reward", "judge")} for one in found]
    pairs = [(one["reward"], one["judge"]) for one in base if len(one["reward"]) > 1]
    agree = [
        {"what": what, "chance": chance, "mean": mean, "low": low, "high": high, "prompts": int(np.isfinite(of).sum())}
        for what, chance, of in (
            ("Spearman", 0.0, [spearman(a, b) for a, b in pairs]),
            ("Kendall tau-b", 0.0, [kendall(a, b) for a, b in pairs]),
            ("pairs ordered alike", 0.5, [agreement(a, b) for a, b in pairs]),
        )
        for mean, low, high in [interval(of)]
    ]
    # One standard deviation for all prompts: that of a single one may be 0.
    sd = {key: float(np.sqrt(np.mean([one[key].var() for one in base]))) or 1.0 for key in ("reward", "judge")}

    def gain(i: int, key: str, rows: Sequence[Mapping[str, Any]]) -> float:
        return float(np.mean([row[key] for row in rows]) - base[i][key].mean()) / sd[key] if rows else float("nan")

    curve = []
    for method in METHODS:
        before: np.ndarray | None = None
        for n in budgets[method]:
            gains = {key: [gain(i, key, one["best"][method][n]) for i, one in enumerate(found)] for key in sd}
            judged = np.array(gains["judge"])
            curve.append(
                {
                    "method": method,
                    "rollouts": n,
                    "reward": interval(gains["reward"]),
                    "judge": interval(gains["judge"]),
                    "judge_since": None if before is None else interval(list(judged - before)),
                    "below_base": float((judged < 0).mean()),
                }
            )
            before = judged
    hacked = [
        {
            "prompt": one["prompt"],
            "method": method,
            "rollouts": n,
            "reward_gain": gain(i, "reward", [row]),
            "judge_gain": gain(i, "judge", [row]),
            "reward": row["reward"],
            "judge": row["judge"],
            "text": row["text"],
            "base": max(one["base"], key=lambda row: row["judge"]),
        }
        for i, one in enumerate(found)
        for method in METHODS
        for n in budgets[method]
        for row in one["best"][method][n]
        if one["base"]
    ]
    hacked = [one for one in hacked if one["reward_gain"] > 0 > one["judge_gain"]]
    hacked.sort(key=lambda one: one["judge_gain"] - one["reward_gain"])
    shown: list[dict[str, Any]] = []
    for one in hacked:  # one a prompt
        if len(shown) < options.examples and one["prompt"] not in {other["prompt"] for other in shown}:
            shown.append(one)
    return {
        "reward": reward,
        "judge": judge,
        "prompts": len(found),
        "rollouts": options.rollouts,
        "max_tokens": options.max_tokens,
        "rows": options.rows,
        "seed": options.seed,
        "base_sd": sd,
        "agreement": agree,
        "curve": curve,
        "hacked": shown,
    }


def figure(values: Sequence[float] | None) -> str:
    return "" if values is None else f"{values[0]:+.2f} ({values[1]:+.2f} to {values[2]:+.2f})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], markdown: bool) -> str:
    if markdown:
        return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]
    )


def report(found: Mapping[str, Any], markdown: bool) -> str:
    """What a person reads; markdown is fit for a page."""

    def quoted(text: str) -> str:
        lines = text.strip().splitlines() or ["(empty)"]
        return "\n".join(f"> {line}" if markdown else f"    {line}" for line in lines)

    head = "### " if markdown else ""
    parts = [
        f"Reward {found['reward']!r}, judge {found['judge']!r}: {found['prompts']} prompts, at most "
        f"{found['max_tokens']} tokens, {found['rows']} rollouts an iteration, seed {found['seed']}.",
        f"{head}Agreement on {found['rollouts']} responses of the base model a prompt",
        table(
            ["", "mean over prompts (95%)", "by chance", "prompts"],
            [
                [
                    a["what"],
                    f"{a['mean']:.2f} ({a['low']:.2f} to {a['high']:.2f})",
                    f"{a['chance']:g}",
                    f"{a['prompts']}",
                ]
                for a in found["agreement"]
            ],
            markdown,
        ),
        f"{head}What a search does to both, in standard deviations of the base model's responses",
        table(
            [
                "method",
                "rollouts",
                "reward of the winner",
                "judge of the winner",
                "judge since the row above",
                "below base",
            ],
            [
                [
                    row["method"],
                    f"{row['rollouts']}",
                    figure(row["reward"]),
                    figure(row["judge"]),
                    figure(row["judge_since"]),
                    f"{row['below_base']:.0%}",
                ]
                for row in found["curve"]
            ],
            markdown,
        ),
        "Change of the judge: since the row above, on the same prompts. Below base: share of prompts "
        "whose winners the judge finds worse than an average response of the base model.",
        f"{head}Winners whose reward rose while the judge's score fell",
    ]
    for one in found["hacked"]:
        base = one["base"]
        parts += [
            f"{one['prompt']!r}, {one['method']} with {one['rollouts']} rollouts: reward {one['reward']:.2f} "
            f"({one['reward_gain']:+.1f} sd), judge {one['judge']:.2f} ({one['judge_gain']:+.1f} sd)",
            quoted(one["text"]),
            f"The response of the base model that the judge likes best (reward {base['reward']:.2f}, judge "
            f"{base['judge']:.2f}):",
            quoted(base["text"]),
        ]
    if not found["hacked"]:
        parts.append("None.")
    return "\n\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("reward", nargs="?", help="default: the shipped one")
    parser.add_argument("judge", nargs="?", default="judge", help="default: the shipped judge")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--rollouts", type=int, default=64, help="of the base model a prompt, for agreement and scale")
    parser.add_argument("--budgets", type=int, nargs="+", default=[4, 16, 64, 256], help="rollouts of both searches")
    parser.add_argument("--strong", type=int, default=512, help="rollouts of the strongest search, aisp-held alone")
    parser.add_argument("--rows", type=int, default=16, help="rollouts an iteration")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--examples", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to a file")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("-m", "--model")
    options = parser.parse_args(arguments)
    texts = prompt_sets()["stories"]["evaluation"]
    if not 1 <= options.prompts <= len(texts):
        parser.error(f"--prompts is {options.prompts}; there are {len(texts)}")
    if min(options.budgets) < 1 or options.rollouts < 2:
        parser.error("--budgets must be at least 1, --rollouts at least 2")
    if options.json is not None:
        check_output(options.json)
    judge = load_reward(options.judge)
    with Aligner.load(options.model, shipped.reward() if options.reward is None else options.reward) as aligner:
        found = measure(aligner.engine, aligner.reward, judge, texts[: options.prompts], options)
    if options.json is not None:
        write_output(options.json, json.dumps(found, ensure_ascii=False, indent=2) + "\n")
    print(report(found, options.markdown))


if __name__ == "__main__":
    main()
