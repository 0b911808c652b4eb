"""Alignment methods: one file an algorithm, ask/tell, no model and no reward inside."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from aisp_local.controllers.aisp import Aisp
from aisp_local.controllers.aisp_held import AispHeld
from aisp_local.controllers.aisp_static import AispStatic
from aisp_local.controllers.base import Controller
from aisp_local.controllers.best_of_n import BestOfN
from aisp_local.controllers.cem import Cem
from aisp_local.controllers.misvo import Misvo
from aisp_local.controllers.score import Score
from aisp_local.controllers.smc import Smc
from aisp_local.controllers.soft_best_of_n import SoftBestOfN
from aisp_local.errors import InputError
from aisp_local.types import Head

METHODS: dict[str, Callable[..., Controller]] = {
    method.name: method for method in (Aisp, AispHeld, AispStatic, BestOfN, Cem, Misvo, Score, Smc, SoftBestOfN)
}

__all__ = [
    "METHODS",
    "Aisp",
    "AispHeld",
    "AispStatic",
    "BestOfN",
    "Cem",
    "Controller",
    "Misvo",
    "Score",
    "Smc",
    "SoftBestOfN",
    "create",
]


def create(
    method: str,
    *,
    d: int,
    max_tokens: int,
    seed: int,
    prompt_index: int = 0,
    head: Callable[[], Head] | None = None,
    unfinished: bool = True,
    **options: Any,
) -> Controller:
    """The controller of a method id.

    ``head`` is asked by methods that follow the score function; ``unfinished``: may responses be scored before they
    end?

    Raises InputError for an unknown method or option.
    """
    builder = METHODS.get(method)
    if builder is None:
        raise InputError(f"method {method!r} is unknown; use one of {', '.join(sorted(METHODS))}")
    common: dict[str, Any] = {"d": d, "max_tokens": max_tokens, "seed": seed, "prompt_index": prompt_index}
    parameters = set(inspect.signature(builder).parameters)
    known = parameters - set(common) - {"head", "unfinished"}
    unknown = sorted(set(options) - known)
    if unknown:
        raise InputError(f"method {method!r} has no option {unknown[0]!r}; its options are {', '.join(sorted(known))}")
    if head is not None and "head" in parameters:
        common["head"] = head()
    if "unfinished" in parameters:
        common["unfinished"] = unfinished
    return builder(**common, **options)
