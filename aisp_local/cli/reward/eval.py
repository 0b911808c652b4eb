"""`aisp-local reward eval`"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from aisp_local.cli.help import ExamplesFirst
from aisp_local.cli.names import FILE
from aisp_local.cli.output import print_json
from aisp_local.cli.reward.common import FOLDER, load_measured

if TYPE_CHECKING:
    from aisp_local.reward_kit.evaluate import Accuracy, Evaluation


@click.command("eval", cls=ExamplesFirst)
@click.argument("folder", type=FOLDER)
@click.argument("data", type=FILE)
@click.option("--plots", type=FILE, help="Write accuracy.svg, calibration.svg and length.svg into this folder.")
@click.option("--json", "json_", is_flag=True, help="Print a JSON object.")
def eval_(folder: Path, data: Path, plots: Path | None, json_: bool) -> None:
    """Measure how often a reward FOLDER agrees with preferences in DATA.

    DATA is JSONL (.gz: gzipped) with 'chosen' and 'rejected' and, where these are only responses, 'prompt': strings,
    lists of messages, or whole dialogues of Human and Assistant. 'source' or 'subset' groups the rows.

    \b
    Examples:
      aisp-local reward eval my_reward pairs.jsonl
      aisp-local reward eval my_reward pairs.jsonl.gz --plots plots --json
    """
    from aisp_local.cli.output import print_answer
    from aisp_local.files import check_output, write_output
    from aisp_local.reward_kit.evaluate import evaluate
    from aisp_local.reward_kit.pairs import read_pairs
    from aisp_local.reward_kit.plots import PLOTS

    pairs = read_pairs(data)
    if plots is not None:
        plots.mkdir(parents=True, exist_ok=True)
        for name in PLOTS:
            check_output(plots / name)
    reward = load_measured(folder)
    shown = sys.stderr is not None and sys.stderr.isatty()

    def progress(done: int, total: int) -> None:
        click.echo(f"\r{done} of {total} pairs" + ("\r\x1b[K" if done == total else ""), err=True, nl=False)

    found = evaluate(reward, pairs, progress if shown else None)
    if plots is not None:
        for name, draw in PLOTS.items():
            write_output(plots / name, draw(found))
    if json_:
        print_json(_as_json(found, data))
    else:
        print_answer("\n".join(_lines(found)))


def _lines(found: Evaluation) -> list[str]:
    """What a person reads."""
    width = max(len(group.name) for group in [found.overall, *found.by_length, *found.by_source])
    lines = [f"{'pairs':<{width}}  {'n':>6}  accuracy (95%)"]
    for groups in ([found.overall], found.by_length, found.by_source):
        lines += [f"{g.name:<{width}}  {g.n:>6}  {g.share:.3f} ({g.low:.3f} to {g.high:.3f})" for g in groups]
    lines += [
        "",
        f"preferring the longer response: {found.longer_wins:.3f}",
        f"score and length: Pearson {found.pearson:.2f}, Spearman {found.spearman:.2f}; "
        f"their differences within pairs: {found.margin_pearson:.2f}, {found.margin_spearman:.2f}",
        f"log loss {found.log_loss:.3f} nats (0.693 knows nothing), calibration error {found.calibration_error:.3f}",
        "",
        "sure by the scores   so in fact (95%)",
    ]
    lines += [
        f"{b.predicted:.3f}  n {b.n:<8} {b.observed:.3f} ({b.low:.3f} to {b.high:.3f})" for b in found.calibration
    ]
    if found.not_finite:
        lines += ["", f"{found.not_finite} pairs left out: a score is not a finite number"]
    return lines


def _as_json(found: Evaluation, data: Path) -> dict[str, Any]:
    def group(a: Accuracy) -> dict[str, Any]:
        return {"name": a.name, "n": a.n, "accuracy": a.share, "low": a.low, "high": a.high}

    return {
        "reward": found.reward,
        "data": str(data),
        "overall": group(found.overall),
        "by_source": [group(a) for a in found.by_source],
        "by_length": [group(a) for a in found.by_length],
        "longer_wins": found.longer_wins,
        "calibration": [vars(b) for b in found.calibration],
        "log_loss": found.log_loss,
        "calibration_error": found.calibration_error,
        "length": {
            "pearson": found.pearson,
            "spearman": found.spearman,
            "margin_pearson": found.margin_pearson,
            "margin_spearman": found.margin_spearman,
        },
        "not_finite": found.not_finite,
    }
