"""What there is for an invertible map of the noise to learn: how much of the reward the noise tells, and how.

    python benchmarks/flow.py [--pair stories] [--prompts 6] [--samples 1024] [--sigma 1.0] [--threads 1]

A flow v = f(eps) can concentrate samples where the reward is high only as far as samples say where that is. Here noise
held at all steps, ``v ~ N(0, sigma^2)``, is drawn for many rollouts of one prompt (greedy, as `aisp-held` and `cem`
decode), and their rewards are predicted from v: by a linear function, which is all that moving the mean uses; by one of
the second degree, which is what a covariance, an affine flow, uses as well; and by a kernel that can be any smooth
function. Printed for each: the share of the variance of rewards not seen in fitting that it explains (R^2 over five
folds, the best of a grid of penalties, which flatters all alike), mean over prompts, by the number of rollouts.
Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

import numpy as np

from aisp_local import Aligner
from aisp_local.bench.contest import Pair
from aisp_local.bench.contest_run import chosen_pairs
from aisp_local.bench.machine import describe
from aisp_local.bench.tables import Table
from aisp_local.seeds import RowSeeds
from aisp_local.types import Controls, FloatArray

PENALTIES = tuple(10.0**k for k in range(-3, 5))
FOLDS = 5


def kernels(v: np.ndarray) -> dict[str, np.ndarray]:
    """Gram matrices [n, n] of noise [n, d] of variance 1."""
    products = v @ v.T / v.shape[1]
    squares = np.diag(products)
    distances = squares[:, None] + squares - 2 * products
    return {
        "linear": products,
        "second degree": products + products**2,
        "any smooth": np.exp(-distances / 2),
    }


def explained(gram: np.ndarray, rewards: np.ndarray) -> float:
    """R^2 of kernel ridge regression on rewards that it was not fitted to, the best of the penalties."""
    n = len(rewards)
    fold = np.random.default_rng(0).permutation(n) % FOLDS
    errors = np.zeros(len(PENALTIES))
    for k in range(FOLDS):
        fit, held = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
        mean = rewards[fit].mean()
        values, vectors = np.linalg.eigh(gram[np.ix_(fit, fit)])
        target = vectors.T @ (rewards[fit] - mean)
        across = gram[np.ix_(held, fit)] @ vectors
        for i, penalty in enumerate(PENALTIES):
            predicted = mean + across @ (target / (np.maximum(values, 0.0) + penalty))
            errors[i] += np.square(rewards[held] - predicted).sum()
    return float(1.0 - errors.min() / np.square(rewards - rewards.mean()).sum())


def sampled(aligner: Aligner, text: str, samples: int, sigma: float, max_tokens: int) -> tuple[FloatArray, np.ndarray]:
    """Noise [samples, d] of variance 1 and the rewards [samples] of greedy rollouts that hold ``sigma`` times it."""
    prompt = [{"role": "user", "content": text}]
    noise = np.random.default_rng(0).standard_normal((samples, aligner.engine.d), dtype=np.float32)
    rewards: list[float] = []
    for start in range(0, samples, 32):
        vectors = np.float32(sigma) * noise[start : start + 32, None]
        controls = Controls(n=len(vectors), vectors=vectors, held=True)
        rollouts = aligner.engine.rollout(prompt, controls, max_tokens=max_tokens, seeds=RowSeeds(0))
        rewards += aligner.reward.score(prompt, list(rollouts.texts)).tolist()
    return noise, np.array(rewards)


def measure(pair: Pair, samples: int, sigma: float, threads: int | None) -> list[dict[str, object]]:
    sizes = sorted({max(2 * FOLDS, samples // divisor) for divisor in (16, 4, 1)})
    found: dict[int, dict[str, list[float]]] = {size: {} for size in sizes}
    with Aligner.load(pair.model, pair.reward, threads=threads) as aligner:
        for text in pair.evaluation:
            noise, rewards = sampled(aligner, text, samples, sigma, pair.max_tokens)
            for size in sizes:
                for name, gram in kernels(noise[:size].astype(np.float64)).items():
                    found[size].setdefault(name, []).append(explained(gram, rewards[:size]))
    return [
        {"pair": pair.name, "rollouts": size, "r2": {name: float(np.mean(of)) for name, of in by_kernel.items()}}
        for size, by_kernel in found.items()
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", action="append", default=[], help="default: stories, stories-judge and dialogs")
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--sigma", type=float, default=1.0)
    parser.add_argument("--threads", type=int)
    asked = parser.parse_args(arguments)
    names = asked.pair or ["stories", "stories-judge", "dialogs"]
    rows: list[dict[str, object]] = []
    for pair in chosen_pairs(None, None, None, None, names, asked.prompts, 96):
        rows += measure(pair, asked.samples, asked.sigma, asked.threads)
    columns = ["pair", "rollouts", "linear", "second degree", "any smooth"]
    made = Table("flow", "Share of the reward's variance that held noise tells (R^2, held out)", columns)
    for row in rows:
        r2 = row["r2"]
        assert isinstance(r2, dict)
        made.rows.append([row["pair"], row["rollouts"], *(f"{r2[name]:.3f}" for name in columns[2:])])
    print(made.markdown())
    print(json.dumps({"machine": describe(), "sigma": asked.sigma, "rows": rows}))


if __name__ == "__main__":
    main()
