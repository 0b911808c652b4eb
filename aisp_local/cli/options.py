"""Options that commands share, and the aligner that they describe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from aisp_local.api import Aligner

F = TypeVar("F", bound=Callable[..., Any])


def model_options(command: F) -> F:
    """-m, -r, --n-gpu-layers, --threads"""
    for option in (
        click.option("--threads", type=click.IntRange(min=1), help="CPU threads for decoding."),
        click.option(
            "--n-gpu-layers",
            type=int,
            envvar="AISP_N_GPU_LAYERS",
            help="Layers on the GPU (0: none, -1: all).",
        ),
        click.option(
            "-r",
            "--reward",
            type=click.Path(path_type=Path),
            envvar="AISP_REWARD",
            help="Reward folder (with reward.json). Default: the shipped one.",
        ),
        click.option(
            "-m",
            "--model",
            type=click.Path(path_type=Path),
            envvar="AISP_MODEL",
            help="GGUF model. Default: the shipped one.",
        ),
    ):
        command = option(command)
    return command


def search_options(command: F) -> F:
    """--method, --max-tokens, --seed, --rows, --time-limit"""
    for option in (
        click.option("--time-limit", type=float, help="Seconds; then the best answer so far."),
        click.option("--seed", type=int, default=0, show_default=True),
        click.option("--rows", type=int, default=16, show_default=True, help="Rollouts at once."),
        click.option("--max-tokens", type=int, default=256, show_default=True),
        click.option(
            "--method",
            default="aisp-held",
            show_default=True,
            help="aisp, aisp-held or best-of-n.",
        ),
    ):
        command = option(command)
    return command


def load(model: Path | None, reward: Path | None, n_gpu_layers: int | None, threads: int | None) -> Aligner:
    from aisp_local.api import Aligner

    return Aligner.load(model, reward, n_gpu_layers=n_gpu_layers, threads=threads)
