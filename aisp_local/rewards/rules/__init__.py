"""Rules: rewards that are a function of the text. 0 is the best score, each violated unit takes 1 away."""

from __future__ import annotations

from aisp_local.rewards.rules.base import Rule
from aisp_local.rewards.rules.classifier import Classifier
from aisp_local.rewards.rules.json_schema import JsonSchema
from aisp_local.rewards.rules.language import Language
from aisp_local.rewards.rules.length import Length
from aisp_local.rewards.rules.patterns import Forbidden, Required
from aisp_local.rewards.rules.readability import Readability, reading_ease
from aisp_local.rewards.rules.repetition import Repetition
from aisp_local.rewards.rules.similarity import Similarity

__all__ = [
    "RULES",
    "Classifier",
    "Forbidden",
    "JsonSchema",
    "Language",
    "Length",
    "Readability",
    "Repetition",
    "Required",
    "Rule",
    "Similarity",
    "reading_ease",
]

RULES: dict[str, type[Rule]] = {
    "class": Classifier,
    "forbidden": Forbidden,
    "json": JsonSchema,
    "language": Language,
    "length": Length,
    "readability": Readability,
    "repetition": Repetition,
    "required": Required,
    "similarity": Similarity,
}
"""By the name that a TOML file calls them."""
