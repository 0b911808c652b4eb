"""Rewards: what a search tries to raise."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from aisp_local.errors import InputError
from aisp_local.rewards.base import Reward
from aisp_local.rewards.function import CallableReward
from aisp_local.rewards.onnx import OnnxReward

__all__ = ["CallableReward", "OnnxReward", "Reward", "load_reward"]


def load_reward(source: str | os.PathLike[str] | Reward | Callable[..., Any]) -> Reward:
    """A reward from a folder with reward.json, a Reward, or a function ``(prompt, responses) -> scores``."""
    if isinstance(source, (str, os.PathLike)):
        return OnnxReward.load(source)
    if isinstance(source, Reward):
        return source
    if callable(source):
        return CallableReward(source)
    raise InputError(f"{source!r} is not a reward: give a folder, a Reward or a function")
