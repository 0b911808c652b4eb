"""`aisp-local reward export`: a Hugging Face model as a reward folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from aisp_local.cli.help import ExamplesFirst
from aisp_local.cli.names import FILE

if TYPE_CHECKING:
    from aisp_local.reward_kit.export import Precision
    from aisp_local.rewards.manifest import Kind


@click.command(cls=ExamplesFirst)
@click.argument("source")
@click.argument("out", type=FILE)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "int8", "int4"]),
    default="fp32",
    show_default=True,
    help="Of the weights in the file; scores are computed in float32.",
)
@click.option(
    "--input",
    "kind",
    type=click.Choice(["pair", "text", "chat"]),
    help="Prompt and response as a pair, the response alone, or a chat template. Default: what the tokenizer has.",
)
@click.option("--max-length", type=int, help="Tokens of an input. Default: the tokenizer's limit, at most 4096.")
@click.option("--index", type=int, help="Which output is the score, from 0; needed when there are several.")
@click.option("--sign", type=click.Choice(["1", "-1"]), default="1", show_default=True, help="-1: lower is better.")
@click.option("--name", help="Default: the name of SOURCE.")
@click.option("--licence", help="Default: what the model card says.")
@click.option(
    "--tolerance",
    type=float,
    help="Greatest difference from the model's scores, as a part of their spread. Default: by precision.",
)
@click.option("--force", is_flag=True, help="Replace an existing reward folder.")
def export(
    source: str,
    out: Path,
    precision: Precision,
    kind: Kind | None,
    max_length: int | None,
    index: int | None,
    sign: str,
    name: str | None,
    licence: str | None,
    tolerance: float | None,
    force: bool,
) -> None:
    """Turn the reward model SOURCE into the reward folder OUT.

    SOURCE is a Hugging Face folder of a sequence-classification model with safetensors weights, or a name on the hub
    (owner/name), which is then downloaded. Needs pip install 'aisp-local[export]'. Code that comes with a model is
    never run.

    \b
    Examples:
      aisp-local reward export ./my-reward-model my-reward
      aisp-local reward export OpenAssistant/reward-model-deberta-v3-base deberta --precision int8
      aisp-local generate "Tell me a story about a fox." -r my-reward
    """
    from aisp_local.cli.output import print_answer
    from aisp_local.reward_kit.export import export_reward
    from aisp_local.reward_kit.export.parity import sentence

    done = export_reward(
        source,
        out,
        precision=precision,
        input=kind,
        max_length=max_length,
        index=index,
        sign=int(sign),
        name=name,
        licence=licence,
        tolerance=tolerance,
        force=force,
        say=lambda text: click.echo(f"aisp-local: {text}", err=True),
    )
    print_answer(
        f"{done.folder}: {done.architecture}, {precision}, {done.n_bytes / 1e6:.1f} MB, input {done.kind}, at most "
        f"{done.max_length} tokens"
    )
    print_answer(sentence(done.parity))
