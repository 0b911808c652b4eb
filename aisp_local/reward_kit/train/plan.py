"""How a reward is trained."""

from __future__ import annotations

from dataclasses import dataclass

from aisp_local.errors import InputError


@dataclass(frozen=True)
class Plan:
    """The defaults fine-tune a pretrained encoder on a few thousand comparisons."""

    epochs: int = 2  # passes over the comparisons; those of graded texts are drawn anew in each
    batch: int = 16  # comparisons
    rate: float = 5e-5  # of the backbone, at its highest
    head_rate: float = 5e-4  # of what comes new
    frozen_layers: int = 0  # the lowest layers; word embeddings always stay as they are
    dropout: float = 0.0  # of all layers; early stopping does as well on so few comparisons, and faster
    weight_decay: float = 0.01
    centring: float = 0.01  # weight of the mean squared score
    warm_up: float = 0.05  # share of the steps
    evaluations: int = 4  # of the held-out comparisons, in each pass
    patience: int = 6  # evaluations without a better loss after which training ends
    minutes: float | None = None  # the schedule ends with them where they are fewer than the passes take
    seed: int = 0  # below 2**32

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "evaluations", "patience"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)} must be at least 1")
        for name in ("rate", "head_rate"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)} must be above 0 and below 1")
        if self.frozen_layers < 0:
            raise InputError(f"frozen_layers {self.frozen_layers} must be at least 0")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout {self.dropout} must be at least 0 and below 1")
        if not 0 <= self.seed < 1 << 32:
            raise InputError(f"seed {self.seed} must be at least 0 and below {1 << 32}")
        if self.minutes is not None and not self.minutes > 0:
            raise InputError(f"minutes {self.minutes} must be more than 0")

    def relative_rate(self, done: float) -> float:
        """Of the highest rate, by the share of the run that is done: up in a line, then down to nothing."""
        return min(1.0, (done + 1e-3) / self.warm_up if self.warm_up else 1.0) * max(0.0, 1.0 - done)
