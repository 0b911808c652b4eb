"""Language models by name: those that were pulled from a hub, and those that other programs keep on this machine."""

from aisp_local.models.find import Found, all_models, find_model

__all__ = ["Found", "all_models", "find_model"]
