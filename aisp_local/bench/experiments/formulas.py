"""Weights and updates by themselves, without a model."""

from __future__ import annotations

import numpy as np

from aisp_local.bench.experiments.lab import Experiment, Finding, Lab
from aisp_local.bench.tables import Table
from aisp_local.controllers import Aisp
from aisp_local.types import Rollouts

_N, _STEPS, _D = 10, 8, 16


def _weights(lab: Lab) -> Finding:
    """Ten trajectories whose rewards are 0 to 9: where does the mean go?"""
    made = Table(
        "weights",
        f"Ten trajectories of rewards 0 to 9, {_STEPS} steps of {_D} numbers; means over 20 seeds",
        [
            "lambda",
            "effective sample size",
            "weight of the best",
            "mean reward under the weights",
            "distance of U to the best, of its length",
        ],
    )
    data = []
    rewards = np.arange(_N, dtype=np.float64)
    for lambda_ in (100.0, 10.0, 3.0, 1.0, 0.3, 0.1, 1e-6):
        found = []
        for seed in range(20):
            controller = Aisp(d=_D, max_tokens=_STEPS, seed=seed, lambda_=lambda_, alpha=1.0)
            asked = controller.ask(_N).vectors
            assert asked is not None
            v = asked.copy()
            tokens = [np.zeros(_STEPS, np.int32)] * _N
            info = controller.tell(Rollouts(tokens, [""] * _N, ["length"] * _N, 0.0, 0), rewards)
            # The weights from U itself: it is a sum of ten independent trajectories.
            weights = np.linalg.lstsq(v.reshape(_N, -1).T, controller.mean.ravel(), rcond=None)[0]
            away = np.linalg.norm(controller.mean - v[-1]) / np.linalg.norm(v[-1])
            found.append([info.ess, weights[-1], float(weights @ rewards), away])
        ess, best, mean, away = np.mean(found, axis=0)
        made.rows.append([f"{lambda_:g}", f"{ess:.2f}", f"{best:.3f}", f"{mean:.2f}", f"{away:.3f}"])
        data.append({"lambda": lambda_, "ess": ess, "best": best, "mean": mean, "away": away})
    return Finding([made], data=data)


WEIGHTS = Experiment(
    "weights",
    "Does the update move the mean of the control to the best of ten trajectories, and how does lambda decide that?",
    "a large lambda weighs all ten alike (effective sample size 10, U near their mean); the smaller it is, the nearer "
    "U comes to the best trajectory (size 1, distance 0), without overflow however small it is.",
    _weights,
)
