"""A reward model of one's own from preferences or graded texts. Needs ``pip install 'aisp-local[export]'``."""

from aisp_local.reward_kit.train.plan import Plan
from aisp_local.reward_kit.train.run import Trained, train_reward

__all__ = ["Plan", "Trained", "train_reward"]
