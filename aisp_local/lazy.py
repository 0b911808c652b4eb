"""Names of a package that are loaded when they are first used: `aisp-local --help` waits for no model's libraries."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def loaded(package: str, places: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """A ``__getattr__`` for a package: ``places`` are its modules, each with the names that it gives the package."""
    of = {name: module for module, names in places.items() for name in names}

    def get(name: str) -> Any:
        if name not in of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{of[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    return get
