"""How well a reward agrees with people's preferences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from aisp_local.errors import ScoreError
from aisp_local.reward_kit.pairs import Pair
from aisp_local.reward_kit.statistics import Array, bradley_terry, pearson, share_right, spearman, wilson
from aisp_local.rewards.base import Reward, call
from aisp_local.rewards.onnx import OnnxReward

ALIKE = 0.1
"""Lengths that differ by less than this share of the longer are alike."""
_PART = 64  # pairs between two reports of progress
_BINS = 10
_BIN_PAIRS = 10  # pairs at least in a bin of the calibration curve


@dataclass(frozen=True)
class Accuracy:
    """Share of n pairs whose chosen side scores higher (ties count half), with its 95% Wilson interval."""

    name: str
    n: int
    share: float
    low: float
    high: float


@dataclass(frozen=True)
class Bin:
    """Pairs about whose preference the reward is about equally sure: mean Bradley-Terry probability, and what is so."""

    n: int
    predicted: float
    observed: float
    low: float
    high: float


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found. Lengths are in characters."""

    reward: str
    overall: Accuracy
    by_source: Sequence[Accuracy]
    by_length: Sequence[Accuracy]  # chosen longer, chosen shorter, alike
    longer_wins: float  # accuracy of preferring the longer side: what a reward has to beat
    calibration: Sequence[Bin]  # predicted from 0.5 to 1
    log_loss: float  # mean of -log of the probability given to what people chose, nats; ln 2 knows nothing
    calibration_error: float  # mean of |predicted - observed| over the bins, weighted by their pairs
    pearson: float  # score and length, over both sides of all pairs
    spearman: float
    margin_pearson: float  # difference of the scores and of the lengths, over pairs: the prompt cancels out
    margin_spearman: float
    not_finite: int  # pairs left out, because a score is not a finite number
    scores: Array  # [n, 2] of the pairs that count: chosen, rejected
    lengths: Array  # [n, 2]


def score_pairs(reward: Reward, pairs: Sequence[Pair], on_progress: Callable[[int, int], None] | None = None) -> Array:
    """Scores [n, 2] of both sides of n pairs."""
    found = np.zeros((len(pairs), 2))
    for start in range(0, len(pairs), _PART):
        part = pairs[start : start + _PART]
        if isinstance(reward, OnnxReward):  # prompts of all kinds in one batch
            sides = [text for pair in part for text in (pair.chosen, pair.rejected)]
            found[start : start + len(part)] = reward.score_many(
                [pair.prompt for pair in part for _ in range(2)], sides
            ).reshape(-1, 2)
        else:
            for i, pair in enumerate(part, start):
                found[i] = call(reward.name, reward.score, pair.prompt, [pair.chosen, pair.rejected])
        if on_progress is not None:
            on_progress(start + len(part), len(pairs))
    return found


def evaluate(
    reward: Reward, pairs: Sequence[Pair], on_progress: Callable[[int, int], None] | None = None
) -> Evaluation:
    """Score all pairs and compare with what people chose. Raises ScoreError when no pair has finite scores."""
    scores = score_pairs(reward, pairs, on_progress)
    usable = np.asarray(np.isfinite(scores).all(axis=1))
    if not usable.any():
        raise ScoreError(f"the reward {reward.name!r} gave no pair two finite scores; see: aisp-local reward verify")
    kept = [pair for pair, fine in zip(pairs, usable, strict=True) if fine]
    scores = scores[usable]
    lengths = np.array([[len(pair.chosen), len(pair.rejected)] for pair in kept], np.float64)
    margins, longer = scores[:, 0] - scores[:, 1], lengths[:, 0] - lengths[:, 1]
    alike = np.abs(longer) <= ALIKE * lengths.max(axis=1)

    sources = sorted({pair.source for pair in kept})
    by_source = [
        _accuracy(source or "(no source)", scores[[pair.source == source for pair in kept]]) for source in sources
    ]
    groups = {"chosen longer": (longer > 0) & ~alike, "chosen shorter": (longer < 0) & ~alike, "alike": alike}
    calibration = _calibration(margins)
    return Evaluation(
        reward=reward.name,
        overall=_accuracy("all", scores),
        by_source=by_source if len(sources) > 1 or sources[0] else [],
        by_length=[_accuracy(name, scores[rows]) for name, rows in groups.items() if rows.any()],
        longer_wins=share_right(lengths),
        calibration=calibration,
        log_loss=float(np.logaddexp(0, -margins).mean()),
        calibration_error=sum(b.n * abs(b.predicted - b.observed) for b in calibration) / len(kept),
        pearson=pearson(scores.ravel(), lengths.ravel()),
        spearman=spearman(scores.ravel(), lengths.ravel()),
        margin_pearson=pearson(margins, longer),
        margin_spearman=spearman(margins, longer),
        not_finite=int(len(pairs) - len(kept)),
        scores=scores,
        lengths=lengths,
    )


def _accuracy(name: str, scores: Array) -> Accuracy:
    share = share_right(scores)
    return Accuracy(name, len(scores), share, *wilson(share * len(scores), len(scores)))


def _calibration(margins: Array) -> list[Bin]:
    """Bins of equally many pairs, by how far their scores are apart."""
    order = np.argsort(np.abs(margins), kind="stable")
    bins = []
    for rows in np.array_split(order, min(_BINS, max(1, len(margins) // _BIN_PAIRS))):
        right = float(((np.sign(margins[rows]) + 1) / 2).sum())
        predicted = float(bradley_terry(np.abs(margins[rows])).mean())
        bins.append(Bin(len(rows), predicted, right / len(rows), *wilson(right, len(rows))))
    return bins
