"""What a reward is worth: checks of a folder, accuracy on preference pairs, and what a folder holds."""

from __future__ import annotations

from aisp_local.reward_kit.evaluate import Evaluation, evaluate
from aisp_local.reward_kit.folders import Described, describe, find_rewards
from aisp_local.reward_kit.pairs import Pair, read_pairs
from aisp_local.reward_kit.verify import Check, verify
from aisp_local.reward_kit.verify_recipe import verify_recipe

__all__ = [
    "Check",
    "Described",
    "Evaluation",
    "Pair",
    "describe",
    "evaluate",
    "find_rewards",
    "read_pairs",
    "verify",
    "verify_recipe",
]
