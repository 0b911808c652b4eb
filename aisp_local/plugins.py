"""What other packages add, through entry points; docs/python.md says how."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal

from aisp_local import shipped
from aisp_local.errors import InputError

Group = Literal["aisp_local.controllers", "aisp_local.rewards"]

_KIND: dict[Group, str] = {"aisp_local.controllers": "method", "aisp_local.rewards": "reward"}


def names(group: Group, builtin: Collection[str]) -> list[str]:
    """What installed packages add to ``builtin``, sorted; nothing is loaded. Warns of what clashes."""
    return sorted(_found(group, builtin))


def packages(group: Group, builtin: Collection[str]) -> dict[str, str]:
    """The same, each with the package that adds it."""
    return {name: _package(point) for name, point in sorted(_found(group, builtin).items())}


def rewards() -> dict[str, str]:
    """The rewards that installed packages add to those shipped, each with its package."""
    return packages("aisp_local.rewards", shipped.named_rewards())


def load(group: Group, name: str, builtin: Collection[str]) -> Any:
    """The object of that name; None if no package adds it. Raises InputError where it cannot be loaded."""
    point = _found(group, builtin).get(name)
    if point is None:
        return None
    try:
        return point.load()
    except Exception as error:  # the package may do anything
        raise InputError(
            f"the {_KIND[group]} {name!r} of the package {_package(point)} cannot be loaded "
            f"({type(error).__name__}: {error}); repair or uninstall the package"
        ) from error


def _found(group: Group, builtin: Collection[str]) -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    twice = set()
    for point in entry_points(group=group):
        if point.name in builtin:
            warnings.warn(
                f"the package {_package(point)} adds a {_KIND[group]} {point.name!r}, "
                "which is the name of a built-in one; it is not used",
                stacklevel=4,
            )
        elif point.name in found and found[point.name].value != point.value:
            twice.add(point.name)
        else:
            found[point.name] = point
    for name in twice:
        warnings.warn(f"two packages add a {_KIND[group]} {name!r}; neither is used, uninstall one", stacklevel=4)
        del found[name]
    return found


def _package(point: EntryPoint) -> str:
    return point.value.split(":")[0] if point.dist is None else point.dist.name
