"""`aisp-local reward train`: a reward model of one's own."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from aisp_local.cli.help import ExamplesFirst
from aisp_local.cli.names import FILE
from aisp_local.cli.output import duration
from aisp_local.cli.reward.common import FOLDER

if TYPE_CHECKING:
    from aisp_local.reward_kit.export import Precision
    from aisp_local.reward_kit.train import Trained
    from aisp_local.reward_kit.train.loop import Progress
    from aisp_local.reward_kit.train.work import WorkFolder
    from aisp_local.rewards.manifest import Kind


_LOG_SECONDS = 60.0  # between lines where nobody watches


@click.command(cls=ExamplesFirst)
@click.argument("data", type=FILE)
@click.argument("out", type=FILE)
@click.option("--backbone", type=FOLDER, help="Hugging Face folder, GGUF file or reward folder. Default: the shipped.")
@click.option("--held-out", type=FILE, help="Rows to stop early by and to evaluate on. Default: a tenth of DATA.")
@click.option("--text", help="Column of the texts, where DATA has labels or grades.")
@click.option("--label", help="Column of the labels or grades.")
@click.option("--prompt", help="Column of the prompts.")
@click.option("--good", multiple=True, help="Label of the better texts; may be repeated. Default: higher numbers.")
@click.option("--epochs", type=int, default=2, show_default=True, help="Passes over DATA.")
@click.option("--minutes", type=float, help="End by then, the learning rate with it.")
@click.option("--batch", type=int, default=16, show_default=True, help="Comparisons of a step.")
@click.option("--rate", type=float, default=5e-5, show_default=True, help="Learning rate of the backbone.")
@click.option("--head-rate", type=float, default=5e-4, show_default=True, help="Learning rate of the head.")
@click.option("--frozen-layers", type=int, default=0, show_default=True, help="Lowest layers to leave as they are.")
@click.option("--dropout", type=float, default=0.0, show_default=True, help="Of all layers.")
@click.option("--patience", type=int, default=6, show_default=True, help="Evaluations (4 a pass) without a better one.")
@click.option("--max-length", type=int, help="Tokens of an input. Default: the backbone's limit, at most 512.")
@click.option("--input", "kind", type=click.Choice(["pair", "text", "chat"]), help="How it is fed, as in export.")
@click.option("--random-weights", is_flag=True, help="Begin with random weights in the backbone's shape.")
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "int8", "int4"]),
    default="int8",
    show_default=True,
    help="Of the weights in the exported file.",
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Default: the GPU, if there is one.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--name", help="Default: the name of OUT.")
@click.option("--description", help="What the reward prefers, in a sentence without its full stop.")
@click.option("--licence", help="Default: the backbone's.")
@click.option("--work", type=FILE, help="Folder of the checkpoints. Default: OUT.training.")
@click.option("--resume", is_flag=True, help="Go on from the checkpoint of a run that was interrupted.")
@click.option("--restart", is_flag=True, help="Delete the checkpoint of such a run, and begin anew.")
@click.option("--force", is_flag=True, help="Replace an existing reward folder.")
def train(
    data: Path,
    out: Path,
    backbone: Path | None,
    held_out: Path | None,
    text: str | None,
    label: str | None,
    prompt: str | None,
    good: tuple[str, ...],
    epochs: int,
    minutes: float | None,
    batch: int,
    rate: float,
    head_rate: float,
    frozen_layers: int,
    dropout: float,
    patience: int,
    max_length: int | None,
    kind: Kind | None,
    random_weights: bool,
    precision: Precision,
    device: str | None,
    seed: int,
    name: str | None,
    description: str | None,
    licence: str | None,
    work: Path | None,
    resume: bool,
    restart: bool,
    force: bool,
) -> None:
    """Train a reward on the preferences or graded texts in DATA and write the reward folder OUT.

    DATA is JSONL (.gz: gzipped), CSV or TSV: 'chosen' and 'rejected' as for eval, or texts with a label or a grade.
    The trained network is exported and evaluated on held-out rows, and OUT/README.md says what was found. Needs pip
    install 'aisp-local[export]'. Once training has begun, Ctrl-C keeps a checkpoint, from which --resume goes on.

    \b
    Examples:
      aisp-local reward train preferences.jsonl my-reward
      aisp-local reward train comments.csv polite --text comment --label verdict --good polite --minutes 20
      aisp-local reward train preferences.jsonl another-reward --backbone ./all-MiniLM-L6-v2
      aisp-local generate "Tell me a story about a fox." -r my-reward
    """
    from aisp_local.cli.output import print_answer
    from aisp_local.reward_kit.train import Plan, train_reward
    from aisp_local.reward_kit.train.examples import Columns
    from aisp_local.reward_kit.train.work import WorkFolder

    plan = Plan(
        epochs=epochs,
        batch=batch,
        rate=rate,
        head_rate=head_rate,
        frozen_layers=frozen_layers,
        dropout=dropout,
        patience=patience,
        minutes=minutes,
        seed=seed,
    )
    terminal = sys.stderr is not None and sys.stderr.isatty()

    printed = 0.0

    def progress(now: Progress) -> None:
        nonlocal printed
        line = _line(now)
        if now.held is not None or (not terminal and now.seconds - printed > _LOG_SECONDS):
            click.echo(("\r\x1b[K" if terminal else "") + line, err=True)
            printed = now.seconds
        elif terminal:
            click.echo(f"\r{line[: shutil.get_terminal_size().columns - 1]}\x1b[K", err=True, nl=False)

    try:
        done = train_reward(
            data,
            out,
            backbone=backbone,
            held_out=held_out,
            columns=Columns(text, label, prompt, good),
            plan=plan,
            random_weights=random_weights,
            input=kind,
            max_length=max_length,
            precision=precision,
            name=name,
            description=description,
            licence=licence,
            work=work,
            resume=resume,
            restart=restart,
            device=device,
            force=force,
            say=lambda said: click.echo(f"aisp-local: {said}", err=True),
            on_progress=progress,
        )
    except KeyboardInterrupt:
        click.echo(f"\naisp-local: {_interrupted(WorkFolder(out, work), out, restart, force)}", err=True)
        raise
    print_answer("\n".join(_lines(done)))


def _interrupted(folder: WorkFolder, out: Path, restart: bool, force: bool) -> str:
    if not folder.has_checkpoint:
        return "interrupted before there was a checkpoint; the same command begins anew"
    options = "--resume" + (" --force" if out.exists() and not force else "")  # it was written, but not evaluated
    return f"interrupted; the same command with {options}{' instead of --restart' if restart else ''} goes on from here"


def _line(now: Progress) -> str:
    left = now.seconds / now.step * (now.steps - now.step)
    line = f"step {now.step}/{now.steps}"
    if now.loss is not None and now.accuracy is not None:
        line += f", loss {now.loss:.3f}, {now.accuracy:.0%} right"
        line += "" if now.held is not None else f", {now.tokens_per_second:.0f} tokens/s"
    if now.held is not None and now.best is not None:
        mark = "best" if now.best == now.held else f"best {now.best.loss:.4f}"
        line += f"; held out: loss {now.held.loss:.4f} ({mark}), {now.held.accuracy:.1%} right"
    return f"{line}; at most {duration(left)} to go"


def _lines(done: Trained) -> list[str]:
    from aisp_local.reward_kit.export.parity import sentence

    found, exported = done.outcome, done.exported
    lines = [
        f"{done.folder}: {exported.architecture}, {exported.parity.precision}, {exported.n_bytes / 1e6:.1f} MB, input "
        f"{exported.kind}, at most {exported.max_length} tokens",
        sentence(exported.parity),
        f"held out: {found.share:.3f} ({found.low:.3f} to {found.high:.3f}) of {found.n} comparisons ranked right",
    ]
    if found.spearman is not None:
        lines.append(f"score and grade: Spearman {found.spearman:.2f}")
    return lines
