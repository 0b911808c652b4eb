"""The values that cross the seams refuse what no engine can decode."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from aisp_local.errors import InputError
from aisp_local.types import GREEDY, Controls, Sampling


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 1e-300}, "temperature is 1e-300"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_k": 1.5}, "top_k is 1.5; it must be a whole number"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"min_p": 1.0}, "min_p is 1.0"),
        ({"min_p": -0.5}, "min_p is -0.5"),
    ],
)
def test_bad_sampling_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Sampling(**options)


def test_only_temperature_zero_is_greedy() -> None:
    assert GREEDY.greedy
    assert not Sampling(temperature=1e-6).greedy


@pytest.mark.parametrize(
    ("n", "shape", "held", "message"),
    [
        (0, None, False, "0 rollouts"),
        (2, (3, 4, 5), False, r"shape \(3, 4, 5\)"),
        (2, (2, 5), False, r"shape \(2, 5\)"),
        (2, (2, 0, 5), False, r"shape \(2, 0, 5\)"),
        (2, (2, 3, 5), True, "not 3"),
    ],
)
def test_bad_controls_are_refused(n: int, shape: tuple[int, ...] | None, held: bool, message: str) -> None:
    vectors = None if shape is None else np.zeros(shape, np.float32)
    with pytest.raises(InputError, match=message):
        Controls(n=n, vectors=vectors, held=held)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_controls_that_are_not_finite_are_refused(bad: float) -> None:
    vectors = np.zeros((2, 3, 4), np.float32)
    vectors[1, 2, 3] = bad
    with pytest.raises(InputError, match="not finite"):
        Controls(n=2, vectors=vectors)


def test_values_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Controls(n=1).n = 2  # type: ignore[misc]
