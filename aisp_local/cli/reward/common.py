"""What the reward commands share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from aisp_local import shipped
from aisp_local.cli.names import FilePath, completing
from aisp_local.errors import InputError

if TYPE_CHECKING:
    from aisp_local.rewards import Reward


class _Folder(FilePath):
    """A path; or a shipped reward by its name, where nothing lies at a path of that name."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = super().convert(value, param, ctx)
        return path if path.exists() else shipped.reward_by_name(str(path)) or path

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        folders = [name for name in shipped.named_rewards() if name not in shipped.recipes()]
        return completing(lambda: folders)(ctx, param, incomplete)


FOLDER = _Folder()


def recipe_file(path: Path) -> Path | None:
    """The TOML file that a path, or the name of a shipped recipe, stands for; None for a folder."""
    if path.suffix == ".toml" and not path.is_dir():
        return path
    return None if path.exists() else shipped.recipes().get(str(path))


def load_measured(path: Path) -> Reward:
    """A reward that can score alone. Raises InputError for one whose scale is measured on a language model."""
    from aisp_local.rewards import load_reward
    from aisp_local.rewards.base import Calibrates

    reward = load_reward(path)
    if isinstance(reward, Calibrates) and reward.uncalibrated:
        raise InputError(
            f"{path} normalises scores by responses of a language model, which are not here; give its parts their "
            f"'mean' and 'std' in {'a copy of ' if not path.exists() else ''}{recipe_file(path) or path}: "
            f"aisp-local generate PROMPT -r {path} --json prints them under 'calibration'"
        )
    return reward


def parameters_text(parameters: Mapping[str, int]) -> str:
    """As in "22.7 M int8, 0.3 M float32"; what is less than a hundredth of all goes unsaid."""
    total = sum(parameters.values())
    shown = [f"{n / 1e6:.3g} M {precision}" for precision, n in parameters.items() if n * 100 >= total]
    return ", ".join(shown) or "none found"
