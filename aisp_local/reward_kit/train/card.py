"""The card of a trained reward: README.md in its folder, with what was measured and nothing else."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from aisp_local.files import write_output
from aisp_local.reward_kit.export.parity import sentence
from aisp_local.reward_kit.train.plan import Plan
from aisp_local.rewards.manifest import Manifest

if TYPE_CHECKING:
    from aisp_local.reward_kit.train.run import Trained


def write_card(done: Trained, manifest: Manifest, plan: Plan, data: Path, held_out: Path | None) -> None:
    """Write README.md into the reward folder."""
    found, best = done.outcome, done.state.best
    assert best is not None
    lines = [
        f"# {manifest.name}",
        "",
        manifest.description + ".",
        "",
        "| | |",
        "|---|---|",
        f"| backbone | {done.backbone}, {done.exported.architecture} |",
        f"| input | {manifest.kind}, at most {manifest.max_length} tokens |",
        f"| trained on | {done.n_train} rows of `{data.name}` (sha256 {_sha256(data)}) |",
        f"| held out | {done.n_held_out} rows"
        + (f" of `{held_out.name}` (sha256 {_sha256(held_out)})" if held_out is not None else ", split off by prompt")
        + " |",
        f"| training | {done.state.step} of {done.steps} steps of {plan.batch} comparisons, "
        f"{done.state.seconds / 60:.1f} minutes; weights of step {best.step}, the best on the held-out rows |",
        f"| settings | rate {plan.rate:g}, head {plan.head_rate:g}, {plan.frozen_layers} frozen layers, weight decay "
        f"{plan.weight_decay:g}, centring {plan.centring:g}, seed {plan.seed} |",
        f"| licence | {manifest.licence} |",
        "",
        "## Held-out figures",
        "",
        f"The exported model ranks {found.share:.3f} ({found.low:.3f} to {found.high:.3f}, 95%) of {found.n} "
        "comparisons right"
        + (f"; Spearman correlation of score and grade {found.spearman:.2f}." if found.spearman is not None else "."),
        "The weights were chosen on these same rows, so that the figure flatters them a little.",
        "",
    ]
    if done.evaluation is not None:
        shown = [done.evaluation.overall, *done.evaluation.by_length, *done.evaluation.by_source]
        lines += ["| pairs | n | accuracy (95%) |", "|---|---|---|"]
        lines += [f"| {g.name} | {g.n} | {g.share:.3f} ({g.low:.3f} to {g.high:.3f}) |" for g in shown]
        lines += [
            "",
            f"Preferring the longer response: {done.evaluation.longer_wins:.3f}. Log loss "
            f"{done.evaluation.log_loss:.3f} nats (0.693 knows nothing), calibration error "
            f"{done.evaluation.calibration_error:.3f}.",
            "",
        ]
    lines += [
        "## Export",
        "",
        sentence(done.exported.parity)[:1].upper() + sentence(done.exported.parity)[1:] + ".",
        "",
    ]
    write_output(done.folder / "README.md", "\n".join(lines))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
