"""Alignment methods: one file an algorithm, ask/tell, no model and no reward inside."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import numpy.typing as npt

from aisp_local import plugins
from aisp_local.controllers.aisp import Aisp
from aisp_local.controllers.aisp_bases import AispBases
from aisp_local.controllers.aisp_held import AispHeld
from aisp_local.controllers.aisp_static import AispStatic
from aisp_local.controllers.args import Args
from aisp_local.controllers.base import Controller
from aisp_local.controllers.best_of_n import BestOfN
from aisp_local.controllers.cem import Cem
from aisp_local.controllers.misvo import Misvo
from aisp_local.controllers.qalign import Qalign
from aisp_local.controllers.re_control import ReControl
from aisp_local.controllers.score import Score
from aisp_local.controllers.smc import Smc
from aisp_local.controllers.soft_best_of_n import SoftBestOfN
from aisp_local.errors import InputError
from aisp_local.types import Head

METHODS: dict[str, Callable[..., Controller]] = {
    method.name: method
    for method in (
        Aisp,
        AispBases,
        AispHeld,
        AispStatic,
        Args,
        BestOfN,
        Cem,
        Misvo,
        Qalign,
        ReControl,
        Score,
        Smc,
        SoftBestOfN,
    )  # fmt: skip
}

__all__ = [
    "METHODS",
    "Aisp",
    "AispBases",
    "AispHeld",
    "AispStatic",
    "Args",
    "BestOfN",
    "Cem",
    "Controller",
    "Misvo",
    "Qalign",
    "ReControl",
    "Score",
    "Smc",
    "SoftBestOfN",
    "builder",
    "create",
    "defaults_of",
    "method_names",
    "options_of",
]


_GIVEN = {"d", "max_tokens", "seed", "prompt_index", "head", "score", "text", "unfinished"}


def method_names() -> list[str]:
    """Every method, those of other packages among them."""
    return sorted([*METHODS, *plugins.names("aisp_local.controllers", METHODS)])


def builder(method: str) -> Callable[..., Controller]:
    """What makes the method's controller. Raises InputError for an unknown method, and where it cannot be loaded."""
    found: Any = METHODS.get(method) or plugins.load("aisp_local.controllers", method, METHODS)
    if found is None:
        raise InputError(f"method {method!r} is unknown; use one of {', '.join(method_names())}")
    if not callable(found):
        raise InputError(f"the method {method!r} is {type(found).__name__}, which makes no controller; give a class")
    return found  # type: ignore[no-any-return]


def options_of(method: str) -> set[str]:
    """The names of a method's options. Raises InputError for an unknown method."""
    return set(inspect.signature(builder(method)).parameters) - _GIVEN


def defaults_of(method: str) -> dict[str, Any]:
    """A method's options with their values where none is given. Raises InputError for an unknown method."""
    known = options_of(method)
    return {name: p.default for name, p in inspect.signature(builder(method)).parameters.items() if name in known}


def create(
    method: str,
    *,
    d: int,
    max_tokens: int,
    seed: int,
    prompt_index: int = 0,
    head: Callable[[], Head] | None = None,
    score: Callable[[Sequence[str]], npt.NDArray[np.float64]] | None = None,
    text: Callable[[npt.NDArray[np.int32]], str] | None = None,
    unfinished: bool = True,
    **options: Any,
) -> Controller:
    """The controller of a method id.

    ``head`` is asked by methods that follow the score function; ``unfinished``: may responses be scored before they
    end? ``score``: rewards of such, and ``text``: what tokens say, for methods that ask while rows decode.

    Raises InputError for an unknown method or option.
    """
    known, make = options_of(method), builder(method)
    common: dict[str, Any] = {"d": d, "max_tokens": max_tokens, "seed": seed, "prompt_index": prompt_index}
    parameters = set(inspect.signature(make).parameters)
    unknown = sorted(set(options) - known)
    if unknown:
        raise InputError(f"method {method!r} has no option {unknown[0]!r}; its options are {', '.join(sorted(known))}")
    if head is not None and "head" in parameters:
        common["head"] = head()
    given = {"score": score, "text": text, "unfinished": unfinished}
    common |= {name: value for name, value in given.items() if name in parameters}
    for name in options:
        _check_kind(options[name], inspect.signature(make).parameters[name])
    try:
        return make(**common, **options)
    except (TypeError, AttributeError) as error:
        shown = ", ".join(f"{name}={value!r}" for name, value in options.items())
        raise InputError(f"method {method!r} cannot use its options {shown} ({error})") from error


def _check_kind(value: Any, parameter: inspect.Parameter) -> None:
    """Raises InputError for an option of another kind than is said of it, or than its default, where that is a number
    or a switch."""
    default: object = parameter.default
    kind = getattr(parameter.annotation, "__name__", str(parameter.annotation)).removesuffix(" | None")
    if value is None and default is None:
        return
    if kind == "bool" or isinstance(default, bool):
        fits, what = value in (True, False), "true or false"
    elif kind == "int":
        fits, what = isinstance(value, Integral) and not isinstance(value, bool), "a whole number"
    elif kind == "float" or isinstance(default, int | float):
        fits, what = isinstance(value, Real) and not isinstance(value, bool), "a number"
    else:
        return
    if not fits:
        raise InputError(f"{parameter.name} is {value!r}; it must be {what}")
