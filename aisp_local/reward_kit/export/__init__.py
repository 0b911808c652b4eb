"""A Hugging Face reward model as a reward folder. Needs ``pip install 'aisp-local[export]'``."""

from aisp_local.reward_kit.export.quantise import PRECISIONS, Precision
from aisp_local.reward_kit.export.run import Exported, export_reward

__all__ = ["PRECISIONS", "Exported", "Precision", "export_reward"]
