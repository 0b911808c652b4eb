"""Noise on pre-logits against noise on logits, at states that the model really has."""

from __future__ import annotations

import math

import numpy as np

from aisp_local.bench.experiments.lab import Array, Experiment, Finding, Lab
from aisp_local.bench.tables import Table
from aisp_local.engine.sampling import log_softmax
from aisp_local.seeds import RowSeeds
from aisp_local.types import Controls, Sampling

_STATES = 192
_DRAWS = 8
_TOP = 20


def _states(lab: Lab) -> Array:
    """Pre-logits [states, d] of steps of base rollouts, all prompts alike."""
    found = []
    for i, prompt in enumerate(lab.prompts):
        rollouts = lab.aligner.engine.rollout(
            prompt,
            Controls(4, sampling=Sampling(0.8)),
            max_tokens=lab.max_tokens,
            seeds=RowSeeds(lab.seed, i),
            want=frozenset({"prelogits"}),
        )
        assert rollouts.prelogits is not None
        found.append(np.concatenate(rollouts.prelogits))
    z = np.concatenate(found).astype(np.float64)
    keep = np.random.default_rng(0).permutation(len(z))[: lab.size(_STATES, 12)]
    return z[keep]


def _moved(logits: Array, noise: Array, temperature: float, top_p: float) -> dict[str, float]:
    """What noise [draws, V] on logits [V] does to the law that is sampled from."""
    base = log_softmax(logits / temperature)
    law = np.exp(base)
    moved = log_softmax((logits + noise) / temperature)
    q = np.exp(moved)
    # KL in the direction of the engine's: from the moved law to the base's.
    kl = (q * (moved - base)).sum(axis=1)
    order = np.argsort(-law)
    inside = q[:, order[:_TOP]].sum(axis=1)
    nucleus = law[order].cumsum() - law[order] < top_p
    return {
        "kl": float(kl.mean()),
        "outside": float((1 - inside).mean() - (1 - law[order[:_TOP]].sum())),
        "unlikely": float((q * (law < 1e-4 * law.max())).sum(axis=1).mean()),
        "nucleus": float((q[:, order[~nucleus]]).sum(axis=1).mean() - law[order[~nucleus]].sum()),
        "changed": float(((logits + noise).argmax(axis=1) != logits.argmax()).mean()),
    }


def _spaces(lab: Lab) -> Finding:
    z, head = _states(lab), lab.aligner.engine.head
    weight = head.weight.astype(np.float64) * head.gain
    rng = np.random.default_rng(1)
    logits = z @ weight.T
    draws: dict[str, list[Array]] = {"pre-logits": [], "logits": []}
    for _ in z:
        draws["pre-logits"].append(rng.standard_normal((_DRAWS, z.shape[1])) @ weight.T)
        draws["logits"].append(rng.standard_normal((_DRAWS, len(weight))))

    def figures(space: str, size: float, temperature: float, top_p: float) -> dict[str, float]:
        found = []
        for row, noise in zip(logits, draws[space], strict=True):
            found.append(_moved(row, size * noise, temperature, top_p))
        return {key: float(np.mean([one[key] for one in found])) for key in found[0]}

    def at_kl(space: str, target: float, temperature: float) -> float:
        """The noise whose mean KL is the target; it grows with the noise."""
        low, high = 1e-4, 20.0
        for _ in range(lab.size(22, 12)):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if figures(space, middle, temperature, 1.0)["kl"] < target else (low, middle)
        return math.sqrt(low * high)

    made = Table(
        "spaces",
        f"Noise of the same mean KL a step at {len(z)} states; what it adds to the law's mass there",
        [
            "KL, nats",
            "temperature",
            "noise on",
            "sigma",
            f"outside the {_TOP} likeliest",
            "on tokens below 1/10,000 of the top",
            "outside the base's top-p 0.9",
            "greedy token changed",
        ],
    )
    data = []
    for target in lab.some((0.05, 0.2, 0.8)):
        for temperature in lab.some((1.0, 0.6)):
            for space in ("pre-logits", "logits"):
                sigma = at_kl(space, target, temperature)
                f = figures(space, sigma, temperature, 0.9)
                shares = [f"{100 * f[key]:+.1f}%" for key in ("outside", "unlikely", "nucleus")]
                made.rows.append(
                    [f"{f['kl']:.2f}", f"{temperature:g}", space, f"{sigma:.2f}", *shares, f"{100 * f['changed']:.0f}%"]
                )
                data.append({"target": target, "temperature": temperature, "space": space, "sigma": sigma, **f})
    return Finding([made, _gaussianity(z)], data=data)


def _gaussianity(z: Array) -> Table:
    """Are the coordinates of pre-logits Gaussian over states, as the prior of the method would have them?"""
    made = Table(
        "gaussian",
        f"Coordinates of pre-logits over {len(z)} states (a Gaussian has skewness 0, excess kurtosis 0; of so many "
        "states the Kolmogorov-Smirnov distance of one is below the bound 19 times in 20)",
        [
            "coordinates",
            "median absolute skewness",
            "median excess kurtosis",
            "median distance to a Gaussian",
            "bound",
            "share within it",
        ],
    )
    x = (z - z.mean(axis=0)) / z.std(axis=0)
    skewness, kurtosis = (x**3).mean(axis=0), (x**4).mean(axis=0) - 3
    erf = np.vectorize(math.erf)
    ordered = np.sort(x, axis=0)
    law = 0.5 * (1 + erf(ordered / math.sqrt(2)))
    steps = np.arange(len(z) + 1)[:, None] / len(z)
    distance = np.maximum(np.abs(law - steps[:-1]).max(axis=0), np.abs(law - steps[1:]).max(axis=0))
    bound = 0.886 / math.sqrt(len(z))  # with estimated mean and deviation (Lilliefors)
    made.rows.append(
        [
            z.shape[1],
            f"{np.median(np.abs(skewness)):.2f}",
            f"{np.median(kurtosis):+.2f}",
            f"{np.median(distance):.3f}",
            f"{bound:.3f}",
            f"{100 * float((distance < bound).mean()):.0f}%",
        ]
    )
    return made


SPACES = Experiment(
    "spaces",
    "Why noise on pre-logits rather than on logits, and are pre-logits Gaussian?",
    "noise of the pre-logits moves tokens together whose rows of W are alike, so at the same KL it leaves less mass on "
    "tokens that the model would never use; independent noise on logits finds the luckiest of V tokens. A lower "
    "temperature and top-p cut what is outside in both. Coordinates over states are near Gaussian, not exactly.",
    _spaces,
)
