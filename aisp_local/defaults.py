"""What a search is given where nothing is said, and what it may be given: known without loading what searches."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral
from typing import Any

from aisp_local import controllers
from aisp_local.errors import InputError
from aisp_local.seeds import RowSeeds

EFFORT = {"low": 32, "medium": 128, "high": 512}
"""Rollouts in all, by the name of the effort."""

DEFAULT_EFFORT = "low"
DEFAULT_METHOD = "score"
DEFAULT_N = 32
DEFAULT_N_WHOLE = 16
"""Where responses are scored at their end only, an iteration can but learn from the one before: more, smaller ones."""
_LEAST_N = 4

MAX_ROWS = 4096
"""Rollouts an iteration: 255 decode at once, more wait for them, and selecting among them takes memory and time."""

MAX_BUDGET = 1_000_000
"""Rollouts in all, every one of which is kept."""

DEFAULT_MAX_TOKENS = 256
DEFAULT_SEED = 0
DEFAULT_TOGETHER = 4
"""Calls that a server decodes in one batch: more gain nothing and make everybody late (docs/server.md)."""


STREAMED: dict[str, dict[str, Any]] = {"score": {"commit": True}}
"""Methods that can choose an answer block by block, with what makes them do so."""


def budget_of(budget: int | None, effort: str = DEFAULT_EFFORT) -> int:
    """Rollouts in all. Raises InputError for an unknown effort."""
    if effort not in EFFORT:
        raise InputError(f"effort {effort!r} is unknown; use one of {', '.join(EFFORT)}")
    return EFFORT[effort] if budget is None else budget


def rollouts_an_iteration(method: str, budget: int, unfinished: bool) -> int:
    """Where nobody says how many. ``unfinished``: the reward can score responses that have not ended.

    Raises InputError for an unknown method.
    """
    iterations = getattr(controllers.builder(method), "iterations", 1)
    if iterations > 1:
        return min(DEFAULT_N_WHOLE, max(_LEAST_N, budget // iterations))
    return DEFAULT_N if unfinished else DEFAULT_N_WHOLE


def layered(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Options of several layers, the weakest first. A budget goes before an effort, but not before a stronger one."""
    found: dict[str, Any] = {}
    for layer in layers:
        if layer.get("effort") is not None:
            found.pop("budget", None)
        found |= layer
    return found


def check_search(
    *,
    method: str,
    budget: int,
    n: int | None,
    max_tokens: int,
    seed: int,
    time_limit: float | None = None,
    **options: Any,
) -> None:
    """Raises InputError for what ``Aligner.generate`` would refuse: before a model is loaded for it."""
    for name, value in (("budget", budget), ("n", n), ("max_tokens", max_tokens), ("seed", seed)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, Integral)):
            raise InputError(f"{name} is {value!r}; it must be a whole number")
    if not 1 <= budget <= MAX_BUDGET:
        raise InputError(f"the budget is {budget} rollouts; it must be 1 to {MAX_BUDGET}")
    if n is not None and not 1 <= n <= MAX_ROWS:
        raise InputError(
            f"n (--rows; with --stream all of the budget) is {n} rollouts an iteration; it must be 1 to {MAX_ROWS}"
        )
    if max_tokens < 1:
        raise InputError(f"max_tokens is {max_tokens}; it must be at least 1")
    if time_limit is not None and not time_limit > 0:
        raise InputError(f"the time limit is {time_limit} seconds; it must be greater than 0")
    RowSeeds(seed)
    controllers.create(method, d=1, max_tokens=1, seed=seed, **options)
