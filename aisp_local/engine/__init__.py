"""Parallel rollouts over llama.cpp."""

from aisp_local.engine.base import Engine, Feed, Job
from aisp_local.engine.llama import LlamaEngine
from aisp_local.engine.plain import Sample
from aisp_local.engine.shared import SharedEngine

__all__ = ["Engine", "Feed", "Job", "LlamaEngine", "Sample", "SharedEngine"]
