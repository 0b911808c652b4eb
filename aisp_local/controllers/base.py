"""The seam between a search and its algorithm: ask for controls, tell their rewards."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from aisp_local.types import ControllerInfo, Controls, FloatArray, Rollouts

ITERATIONS = 4
"""Of a method that can learn only from whole iterations (its attribute ``iterations``): how many a budget is cut into
where nobody says how large they are."""


class Controller(Protocol):
    """Proposes controls and learns from rewards. It never calls an engine or a reward.

    An iteration may be decoded block by block: controls with a ``pause`` make unfinished rollouts, which the reward
    scores as such, and the next ``ask`` is for as many as paused, to go on from any of them by ``prefixes``.
    """

    @property
    def name(self) -> str:
        """The method's id."""

    def ask(self, n: int) -> Controls:
        """Controls for the n rollouts of the next iteration (the last one may be smaller)."""

    def tell(self, rollouts: Rollouts, rewards: npt.NDArray[np.float64]) -> ControllerInfo:
        """Learn from the rollouts of the last ``ask`` and their rewards [n]; not finite: no weight."""


@runtime_checkable
class Prepares(Protocol):
    """A controller that can do part of its next ``ask`` before it is told of the last one."""

    def prepare(self, n: int) -> None:
        """Draw what the next ``ask(n)`` needs whatever is told until then; in another thread, while rows decode."""


@runtime_checkable
class Steers(Protocol):
    """A controller with one control at all steps, from which another search may start (its option ``steering``).

    It may have ``held_nats``: the KL of a response under it from one without. Then ``steering_nats`` is an option too.
    """

    @property
    def held(self) -> FloatArray:
        """u [d]."""


@runtime_checkable
class Chooses(Protocol):
    """A controller whose answer need not be the best rollout."""

    def choose(self, rewards: npt.NDArray[np.float64]) -> int:
        """The index of the answer among all rollouts so far [N], in the order they were told; one is finite."""
