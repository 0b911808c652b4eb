"""Rewards: what a search tries to raise."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aisp_local import lazy

if TYPE_CHECKING:
    from aisp_local.rewards.base import Reward, score_prefixes
    from aisp_local.rewards.composite import Composite, Part
    from aisp_local.rewards.function import CallableReward
    from aisp_local.rewards.load import load_reward
    from aisp_local.rewards.onnx import OnnxReward
    from aisp_local.rewards.recipe import load_recipe
    from aisp_local.rewards.server import ServerReward
else:
    __getattr__ = lazy.loaded(
        __name__,
        {
            "base": ("Reward", "score_prefixes"),
            "composite": ("Composite", "Part"),
            "function": ("CallableReward",),
            "load": ("load_reward",),
            "onnx": ("OnnxReward",),
            "recipe": ("load_recipe",),
            "server": ("ServerReward",),
        },
    )

__all__ = [
    "CallableReward",
    "Composite",
    "OnnxReward",
    "Part",
    "Reward",
    "ServerReward",
    "load_recipe",
    "load_reward",
    "score_prefixes",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
