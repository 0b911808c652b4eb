"""Several rewards as one: their sum, the worst of them, or their mean less their disagreement."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from aisp_local.errors import RewardError, ScoreError
from aisp_local.rewards.base import Calibrates, Reward, call
from aisp_local.types import Calibration, Prompt

Combine = Literal["sum", "worst", "cautious"]
COMBINE: tuple[Combine, ...] = get_args(Combine)
ROLLOUTS = 16
_SMALL = 1e-6
"""A standard deviation below this, relative to the mean, is rounding: the part does not differ on the base model."""

Scores = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Part:
    """One reward of a composite. Normalised, its score is ``(score - mean) / std`` before anything else.

    ``mean`` and ``std`` are those of the part's scores of the base model's responses; left out, they are measured at
    the start of a search. A part that gave all of these the same score keeps its scale.
    """

    reward: Reward
    weight: float = 1.0
    normalise: bool = False
    mean: float | None = None
    std: float | None = None
    name: str = ""  # the reward's own, unless given

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight) or self.weight == 0:
            raise RewardError(f"'weight' is {self.weight}; it must be a finite number other than 0")
        if (self.mean is None) != (self.std is None):
            raise RewardError("'mean' and 'std' go together; give both or none")
        if self.mean is not None and not self.normalise:
            raise RewardError("'mean' and 'std' are used only with 'normalise'; set it to true")
        if self.mean is not None and not math.isfinite(self.mean):
            raise RewardError(f"'mean' is {self.mean}; it must be finite")
        if self.std is not None and not 0 < self.std < math.inf:
            raise RewardError(f"'std' is {self.std}; it must be finite and greater than 0")
        if isinstance(self.reward, Calibrates) and self.reward.uncalibrated:
            raise RewardError(
                f"the composite reward {self.reward.name!r} is a part and has no 'mean' and 'std' of its own "
                "parts yet; give them, or put its parts here"
            )

    @property
    def label(self) -> str:
        return self.name or self.reward.name

    @property
    def uncalibrated(self) -> bool:
        return self.normalise and self.mean is None

    def scaled(self, scores: Scores) -> Scores:
        """The part's scores as they enter the whole, without the weight."""
        if not self.normalise:
            return scores
        if self.mean is None or self.std is None:
            raise RewardError(
                f"the part {self.label!r} is normalised and was never measured: give its 'mean' and 'std', "
                "score through an Aligner, or call calibrate() with responses of the base model"
            )
        return (scores - self.mean) / self.std


class Composite:
    """Parts combined into one reward, higher is better. With z_i the part's score, normalised if it is to be:

    - ``sum``: sum of w_i z_i;
    - ``worst``: the least z_i; weights are not used;
    - ``cautious``: m - k s, with m the mean of the z_i and s their standard deviation, both weighted by w_i > 0.

    ``judge`` is not a part: an Aligner shows its score beside this one's and never optimises it. ``rollouts``: how many
    responses of the base model the parts without mean and std are measured on. Raises RewardError.
    """

    def __init__(
        self,
        parts: Sequence[Part | Reward],
        *,
        combine: Combine = "sum",
        k: float = 1.0,
        name: str = "composite",
        judge: Reward | None = None,
        rollouts: int = ROLLOUTS,
        calibration: Calibration | None = None,
    ) -> None:
        if not parts:
            raise RewardError("a composite reward needs at least one part")
        if combine not in COMBINE:
            raise RewardError(f"'combine' is {combine!r}; use one of {', '.join(COMBINE)}")
        if not (math.isfinite(k) and k >= 0):
            raise RewardError(f"'k' is {k}; it must be finite and at least 0")
        if rollouts < 2:
            raise RewardError(f"'rollouts' is {rollouts}; a standard deviation needs at least 2")
        self.parts = _named([part if isinstance(part, Part) else Part(part) for part in parts])
        weights = [part.weight for part in self.parts]
        if combine == "worst" and set(weights) != {1.0}:
            raise RewardError("'weight' has no meaning with combine = 'worst'; leave it out")
        if combine == "cautious" and min(weights) < 0:
            raise RewardError("'weight' must be greater than 0 with combine = 'cautious'")
        self.combine, self.k, self.name, self.judge, self.rollouts = combine, k, name, judge, rollouts
        self.calibration = calibration
        self.background = all(getattr(part.reward, "background", False) for part in self.parts)
        self.prefix = all(getattr(part.reward, "prefix", False) for part in self.parts)
        self.unfinished = all(getattr(part.reward, "unfinished", True) for part in self.parts)

    def score(self, prompt: Prompt, responses: Sequence[str]) -> npt.NDArray[np.float32]:
        """Scores [n]. Raises ScoreError, and RewardError where a part has to be measured first."""
        with np.errstate(over="ignore"):
            return self.score_parts(prompt, responses)[0].astype(np.float32)

    def score_parts(self, prompt: Prompt, responses: Sequence[str]) -> tuple[Scores, Mapping[str, Scores]]:
        """Scores [n], and those of the parts by their names, as these gave them."""
        found = self._found(prompt, responses)
        with np.errstate(all="ignore"):  # a score that is not finite makes the whole so, and never wins
            z = np.stack([part.scaled(found[part.label]) for part in self.parts])
            return self._combined(z), found

    def _found(self, prompt: Prompt, responses: Sequence[str]) -> dict[str, Scores]:
        return {part.label: call(part.label, part.reward.score, prompt, responses) for part in self.parts}

    def _combined(self, z: Scores) -> Scores:
        """[parts, n] -> [n]"""
        w = np.array([part.weight for part in self.parts])[:, None]
        if self.combine == "sum":
            return np.asarray((w * z).sum(axis=0))
        if self.combine == "worst":
            return np.asarray(z.min(axis=0))
        mean = (w * z).sum(axis=0) / w.sum()
        std = np.sqrt((w * (z - mean) ** 2).sum(axis=0) / w.sum())
        return np.asarray(mean - self.k * std)

    @property
    def uncalibrated(self) -> bool:
        """Whether a part is to be normalised and has no mean and std yet."""
        return any(part.uncalibrated for part in self.parts)

    def calibrate(self, prompt: Prompt, responses: Sequence[str]) -> Composite:
        """The same with the mean and standard deviation of these responses for each part that had none.

        Bit for bit the same for the same scores in whatever order. Raises ScoreError if a part has not two that are
        finite.
        """
        open_parts = [part for part in self.parts if part.uncalibrated]
        moments = {
            part.label: _moments(part.label, call(part.label, part.reward.score, prompt, responses))
            for part in open_parts
        }
        return self.with_calibration(Calibration(len(responses), moments))

    def with_calibration(self, calibration: Calibration) -> Composite:
        """The same with means and standard deviations that were measured before."""
        parts = [
            replace(part, mean=calibration.moments[part.label][0], std=calibration.moments[part.label][1])
            if part.label in calibration.moments
            else part
            for part in self.parts
        ]
        return Composite(
            parts,
            combine=self.combine,
            k=self.k,
            name=self.name,
            judge=self.judge,
            rollouts=self.rollouts,
            calibration=calibration,
        )


def _moments(label: str, scores: Scores) -> tuple[float, float]:
    """Mean and standard deviation (of the population) of the finite scores; std 1 where they do not differ."""
    finite = [float(score) for score in scores if math.isfinite(score)]
    if len(finite) < 2:
        raise ScoreError(
            f"the part {label!r} gave {len(finite)} finite scores for {len(scores)} responses of the base model; "
            "it cannot be normalised: give its 'mean' and 'std'"
        )
    # fsum is exact, so that the order of the responses cannot matter.
    mean = math.fsum(finite) / len(finite)
    std = math.sqrt(math.fsum((score - mean) ** 2 for score in finite) / len(finite))
    return mean, std if std > _SMALL * max(1.0, abs(mean)) else 1.0


def _named(parts: Sequence[Part]) -> tuple[Part, ...]:
    """The parts with a name of their own each: the second "length" is "length-2"."""
    named: list[Part] = []
    taken: set[str] = set()
    for part in parts:
        label, n = part.label, 1
        while label in taken:
            n += 1
            label = f"{part.label}-{n}"
        taken.add(label)
        named.append(replace(part, name=label))
    return tuple(named)
