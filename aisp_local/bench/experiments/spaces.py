"""Noise on pre-logits against noise on logits, at states that the model really has, and what those are like."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from aisp_local.bench.experiments.lab import Array, Experiment, Finding, Lab
from aisp_local.bench.tables import Table
from aisp_local.engine.sampling import kept, log_law, log_softmax
from aisp_local.errors import InputError
from aisp_local.seeds import RowSeeds
from aisp_local.types import Controls, FloatArray, Sampling

_ROLLOUTS = 128  # of all prompts together
_EVERY = 2  # a state of so many steps is taken: those of one rollout depend on each other
_MOST = 6000  # states
_STATES = 192  # that noise is measured at
_DRAWS = 8
_BYTES = 1 << 30  # of the draws, of a large vocabulary at fewer states
_TOP = 20
_TOP_P = 0.9
_TOKENS, _LEAST = 8, 48  # whose states are looked at by themselves, and how many states they must have


def _states(lab: Lab) -> tuple[FloatArray, npt.NDArray[np.int64]]:
    """Pre-logits [states, d] of steps of base rollouts, of all prompts and in no order, and the token drawn there."""
    found, drawn = [], []
    for i, prompt in enumerate(lab.prompts):
        rollouts = lab.aligner.engine.rollout(
            prompt,
            Controls(lab.size(-(-_ROLLOUTS // len(lab.prompts)), 4), sampling=Sampling(0.8)),
            max_tokens=lab.max_tokens,
            seeds=RowSeeds(lab.seed, i),
            want=frozenset({"prelogits"}),
        )
        assert rollouts.prelogits is not None
        seen: set[bytes] = set()  # rollouts that begin alike have the same states
        for tokens, states in zip(rollouts.tokens, rollouts.prelogits, strict=True):
            for step in range(0, len(tokens), _EVERY):
                prefix = tokens[:step].tobytes()
                if prefix not in seen:
                    seen.add(prefix)
                    found.append(states[step])
                    drawn.append(int(tokens[step]))
    order = np.random.default_rng(0).permutation(len(found))[:_MOST]
    return np.array(found)[order], np.array(drawn)[order]


def _kl(logits: Array, noise: Array, temperature: float) -> float:
    """Of the law moved by noise [draws, V] on logits [V] to the base's, as the engine's is, mean over draws."""
    base, moved = log_softmax(logits / temperature), log_softmax((logits + noise) / temperature)
    return float((np.exp(moved) * (moved - base)).sum(axis=1).mean())


def _moved(logits: Array, noise: Array, temperature: float, top_p: float) -> dict[str, float]:
    """What noise [draws, V] on logits [V] adds to the law that is sampled from, which top-p cuts, mean over draws."""
    cut = Sampling(temperature, top_p=top_p)
    whole, moved = logits[None].astype(np.float32), (logits + noise).astype(np.float32)  # as the engine has them
    added = (np.exp(log_law(moved, cut)) - np.exp(log_law(whole, cut))).mean(axis=0)
    law = np.exp(log_softmax(logits / temperature))
    nucleus = kept(whole, Sampling(temperature, top_p=_TOP_P))[0]
    return {
        "outside": float(added[np.argsort(-law)[_TOP:]].sum()),
        "unlikely": float(added[law < 1e-4 * law.max()].sum()),
        "nucleus": float(added[~nucleus].sum()),
        "changed": float((moved.argmax(axis=1) != whole.argmax()).mean()),
    }


def _spaces(lab: Lab) -> Finding:
    states, tokens = _states(lab)
    head = lab.aligner.engine.head
    weight = head.weight.astype(np.float64) * head.gain
    most = max(12, _BYTES // (2 * _DRAWS * len(weight) * 8))
    z = states[: lab.size(min(_STATES, most), 12)].astype(np.float64)
    if not np.allclose(head.logits(states[:1]), z[:1] @ weight.T, rtol=1e-3, atol=1e-3):
        raise InputError("this experiment is for models whose logits are W z; those of this one are capped or biased")
    rng = np.random.default_rng(1)
    logits = z @ weight.T
    draws: dict[str, list[Array]] = {"pre-logits": [], "logits": []}
    for _ in z:
        draws["pre-logits"].append(rng.standard_normal((_DRAWS, z.shape[1])) @ weight.T)
        draws["logits"].append(rng.standard_normal((_DRAWS, len(weight))))

    def kl(space: str, size: float, temperature: float) -> float:
        return float(np.mean([_kl(row, size * n, temperature) for row, n in zip(logits, draws[space], strict=True)]))

    def at_kl(space: str, target: float, temperature: float) -> float:
        """The noise whose mean KL is the target; it grows with the noise."""
        low, high = 1e-4, 20.0
        for _ in range(lab.size(22, 12)):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if kl(space, middle, temperature) < target else (low, middle)
        return math.sqrt(low * high)

    def figures(space: str, size: float, temperature: float, top_p: float) -> dict[str, float]:
        pairs = zip(logits, draws[space], strict=True)
        found = [_moved(row, size * noise, temperature, top_p) for row, noise in pairs]
        return {key: float(np.mean([one[key] for one in found])) for key in found[0]}

    made = Table(
        "spaces",
        f"Noise of the same mean KL a step at {len(z)} states; what it adds to the masses of the law that is sampled "
        "from, whole or cut by its own top-p",
        [
            "KL without top-p, nats",
            "temperature",
            "top-p",
            "noise on",
            "sigma",
            f"outside the base's {_TOP} likeliest",
            "on tokens below 1/10,000 of the base's top",
            f"outside the base's top-p {_TOP_P}",
            "greedy token changed",
        ],
    )
    data: list[dict[str, Any]] = []
    for target in lab.some((0.05, 0.2, 0.8)):
        for temperature in lab.some((1.0, 0.6)):
            sigmas = {space: at_kl(space, target, temperature) for space in draws}
            for top_p in (1.0, _TOP_P):
                for space, sigma in sigmas.items():
                    nats, f = kl(space, sigma, temperature), figures(space, sigma, temperature, top_p)
                    shares = [f"{100 * f[key]:+.1f}%" for key in ("outside", "unlikely", "nucleus")]
                    knobs = [f"{nats:.2f}", f"{temperature:g}", f"{top_p:g}", space, f"{sigma:.2f}"]
                    made.rows.append([*knobs, *shares, f"{100 * f['changed']:.0f}%"])
                    data.append(
                        {"target": target, "temperature": temperature, "top_p": top_p, "space": space, "sigma": sigma}
                        | {"kl": nats, **f}
                    )
    shapes = _gaussianity(z, states, tokens, lab.aligner.engine.piece, lab.size(_LEAST, 4))
    return Finding([made, shapes[0]], data={"noise": data, "gaussian": shapes[1]})


def _gaussianity(
    z: Array, states: FloatArray, tokens: npt.NDArray[np.int64], piece: Callable[[int], bytes], least: int
) -> tuple[Table, list[dict[str, Any]]]:
    """Are the coordinates of pre-logits Gaussian, as the prior of the method would have them, where a token is drawn?

    ``states`` [N, d] with the ``tokens`` [N] drawn there, and some of them, whatever was drawn: ``z``.
    """
    ids, counts = np.unique(tokens, return_counts=True)
    frequent = [int(ids[i]) for i in np.argsort(-counts, kind="stable")[:_TOKENS] if counts[i] >= least]
    groups = [(_shown(piece(token), token), _shape(states[tokens == token])) for token in frequent]
    made = Table(
        "gaussian",
        f"The {z.shape[1]} coordinates of pre-logits over states at which one token was drawn, and over any. A "
        "Gaussian has skewness 0 and excess kurtosis 0 (of N states of one the median absolute skewness is 1.65 / "
        "sqrt N), and of so many independent states its Kolmogorov-Smirnov distance is below the bound 19 times in "
        f"20; of each rollout every {_EVERY}nd state was taken, and those still depend on each other, which makes "
        "distances larger",
        [
            "token drawn",
            "states",
            "median absolute skewness",
            "median excess kurtosis",
            "median distance to a Gaussian",
            "bound",
            "share within it",
        ],
    )
    data: list[dict[str, Any]] = []
    for name, f in [*groups, ("any", _shape(z))]:
        made.rows.append(
            [
                name,
                f["states"],
                f"{f['skewness']:.2f}",
                f"{f['kurtosis']:+.2f}",
                f"{f['distance']:.3f}",
                f"{f['bound']:.3f}",
                f"{100 * f['within']:.0f}%",
            ]
        )
        data.append({"token": name, **f})
    return made, data


def _shown(piece: bytes, token: int) -> str:
    """A token as a cell of a table."""
    text = piece.decode("utf-8", "replace")
    return "`" + repr(text).replace("|", "\\|").replace("`", "'") + "`" if text else f"token {token}"


def _shape(states: npt.NDArray[Any]) -> dict[str, Any]:
    """Of the coordinates of states [N, d], each by itself."""
    z = states.astype(np.float64)
    spread = z.std(axis=0)
    x = (z - z.mean(axis=0)) / np.where(spread > 0, spread, 1.0)  # of a constant: 0, far from Gaussian
    skewness, kurtosis = (x**3).mean(axis=0), (x**4).mean(axis=0) - 3
    erf = np.vectorize(math.erf)
    ordered = np.sort(x, axis=0)
    law = 0.5 * (1 + erf(ordered / math.sqrt(2)))
    steps = np.arange(len(z) + 1)[:, None] / len(z)
    distance = np.maximum(np.abs(law - steps[:-1]).max(axis=0), np.abs(law - steps[1:]).max(axis=0))
    bound = 0.886 / math.sqrt(len(z))  # with estimated mean and deviation (Lilliefors)
    return {
        "states": len(z),
        "skewness": float(np.median(np.abs(skewness))),
        "kurtosis": float(np.median(kurtosis)),
        "distance": float(np.median(distance)),
        "bound": bound,
        "within": float((distance < bound).mean()),
    }


SPACES = Experiment(
    "spaces",
    "Why noise on pre-logits rather than on logits, and are pre-logits Gaussian?",
    "noise of the pre-logits moves tokens together whose rows of W are alike, so at the same KL it leaves less mass on "
    "tokens that the model would never use; independent noise on logits finds the luckiest of V tokens. A lower "
    "temperature and top-p cut what is outside in both. Coordinates are near Gaussian, not exactly, over all states "
    "and over those at which one token is drawn.",
    _spaces,
    prompts=8,
)
