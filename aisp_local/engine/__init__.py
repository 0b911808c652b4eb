"""Parallel rollouts over llama.cpp."""

from aisp_local.engine.base import Engine, Want
from aisp_local.engine.llama import LlamaEngine

__all__ = ["Engine", "LlamaEngine", "Want"]
