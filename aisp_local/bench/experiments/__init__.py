"""Experiments: a question each, a command each, a small result each. See ``docs/results/``."""

from __future__ import annotations

from aisp_local.bench.experiments import (
    adaptation,
    adapters,
    budgets,
    formulas,
    knobs,
    objectives,
    rewards,
    settings,
    spaces,
)
from aisp_local.bench.experiments.lab import Experiment

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        formulas.WEIGHTS,
        settings.LAMBDA,
        budgets.SAMPLES,
        knobs.STRENGTH,
        knobs.BLOCKS,
        rewards.BEGINNINGS,
        rewards.NOISE,
        settings.MAP,
        objectives.OBJECTIVES,
        adaptation.ADAPTATION,
        budgets.PRODUCT,
        budgets.BATCHED,
        adaptation.CONVERGENCE,
        adapters.LORA,
        spaces.SPACES,
        settings.WINDOW,
    )
}

__all__ = ["EXPERIMENTS", "Experiment"]
