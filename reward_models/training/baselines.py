"""What a reward model has to beat: length, and a bag of words. numpy only."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from aisp_local.reward_kit.pairs import Pair

Array = npt.NDArray[np.float64]
BUCKETS = 1 << 14
WORD = re.compile(r"[a-z']+|[.!?,]")


def features(text: str) -> npt.NDArray[np.int64]:
    """Hashed words and word pairs of a text, each once."""
    words = WORD.findall(text.lower())
    grams = set(words) | {f"{a} {b}" for a, b in zip(words, words[1:], strict=False)}
    return np.array([zlib.crc32(gram.encode()) % BUCKETS for gram in sorted(grams)], np.int64)


class BagOfWords:
    """A logistic pairwise model on the difference of two hashed bags, without the prompt."""

    def __init__(self, pairs: Sequence[Pair], *, epochs: int = 6, rate: float = 0.3) -> None:
        self.weights: Array = np.zeros(BUCKETS)
        rng = np.random.default_rng(0)
        bags = [(features(pair.chosen), features(pair.rejected)) for pair in pairs]
        squares = np.full(BUCKETS, 1e-8)  # AdaGrad
        for _ in range(epochs):
            for i in rng.permutation(len(bags)):
                chosen, rejected = bags[i]
                margin = self.score_bag(chosen) - self.score_bag(rejected)
                pull = 1.0 / (1.0 + np.exp(np.clip(margin, -30, 30)))
                for bag, sign in ((chosen, 1.0), (rejected, -1.0)):
                    if len(bag):
                        step = sign * pull / np.sqrt(len(bag))
                        squares[bag] += step * step
                        self.weights[bag] += rate * step / np.sqrt(squares[bag])

    def score_bag(self, bag: npt.NDArray[np.int64]) -> float:
        return float(self.weights[bag].sum() / np.sqrt(max(1, len(bag))))

    def score(self, text: str) -> float:
        return self.score_bag(features(text))


def longer_wins(pairs: Sequence[Pair]) -> float:
    """Accuracy of preferring the longer side (in characters); equal lengths count half."""
    wins = [np.sign(len(pair.chosen) - len(pair.rejected)) for pair in pairs]
    return float((np.mean(wins) + 1) / 2)
