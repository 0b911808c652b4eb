"""What a response must be: text in llama.cpp's grammar notation (GBNF), or a JSON schema made into it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from aisp_local.errors import InputError
from aisp_local.grammar.gbnf import check
from aisp_local.grammar.json_schema import from_schema

__all__ = ["Grammar"]


@dataclass(frozen=True)
class Grammar:
    """Responses are texts of the rule ``root``. ``gbnf`` is checked: InputError says the line of what is wrong."""

    gbnf: str

    def __post_init__(self) -> None:
        if not isinstance(self.gbnf, str):
            raise InputError(f"a grammar must be text, not {type(self.gbnf).__name__}")
        check(self.gbnf)

    @classmethod
    def of(cls, given: Grammar | str | Mapping[str, Any]) -> Grammar:
        """A grammar as it is, from GBNF, or from a JSON schema (a mapping).

        Raises InputError for what is no grammar, and for a keyword of a schema that a grammar cannot hold responses to.
        """
        if isinstance(given, Grammar):
            return given
        return cls(from_schema(given) if isinstance(given, Mapping) else given)
