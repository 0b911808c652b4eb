"""A reward from whatever stands for one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aisp_local import plugins, shipped
from aisp_local.errors import AispError, InputError, RewardError
from aisp_local.rewards.base import Reward
from aisp_local.rewards.function import CallableReward
from aisp_local.rewards.onnx import OnnxReward
from aisp_local.rewards.recipe import load_recipe


def load_reward(source: str | os.PathLike[str] | Reward | Callable[..., Any]) -> Reward:
    """A reward from what lies at a path: a folder with reward.json or a TOML file (docs/reward-rules.md); else by name:
    a shipped reward ("shipped") or recipe, or one of another package; or a Reward, or a function
    ``(prompt, responses) -> scores``."""
    if isinstance(source, (str, os.PathLike)):
        return _from_path(Path(source))
    if isinstance(source, Reward):
        return source
    if callable(source):
        return CallableReward(source)
    raise InputError(f"{source!r} is not a reward: give a folder, a TOML file, a Reward or a function")


def _from_path(path: Path) -> Reward:
    if path.suffix == ".toml" and not path.is_dir():
        return load_recipe(path)
    if not path.exists() and len(path.parts) == 1:
        recipes = shipped.recipes()
        if path.name in recipes:
            return load_recipe(recipes[path.name])
        if (folder := shipped.reward_by_name(path.name)) is not None:
            return OnnxReward.load(folder)
        if (make := plugins.load("aisp_local.rewards", path.name, shipped.named_rewards())) is not None:
            return _of_plugin(path.name, make)
        raise RewardError(
            f"reward folder {path} does not exist; check the path given with -r, "
            f"or use a recipe by its name: {', '.join([*recipes, *plugins.rewards()])}"
        )
    return OnnxReward.load(path)


def _of_plugin(name: str, make: Any) -> Reward:
    """From a function without arguments that gives whatever ``load_reward`` takes."""
    try:
        made = make()
    except AispError:
        raise
    except Exception as error:  # the package may do anything
        raise RewardError(f"the reward {name!r} cannot be made ({type(error).__name__}: {error})") from error
    return load_reward(made)
