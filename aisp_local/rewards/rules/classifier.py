"""The probability that a classifier gives a class: toxicity, sentiment, a topic."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from aisp_local.errors import RewardError
from aisp_local.rewards.onnx import OnnxReward
from aisp_local.rewards.rules.base import Rule, choice, flag, whole
from aisp_local.types import Prompt


class Classifier(Rule):
    """With p the classes' probability: p - 1 if they are wanted, else -p. 0 to -1.

    ``folder`` is a reward folder whose ONNX model gives logits [n, k]; its 'index', 'sign' and 'scale' are not used.
    ``columns`` are the classes, from 0. ``through``: "softmax", of which the columns' probabilities are added up, or
    "sigmoid", of which the greatest counts (labels that do not exclude one another).
    """

    PATHS = ("folder",)

    def __init__(
        self,
        *,
        folder: str | os.PathLike[str] | OnnxReward,
        columns: Sequence[int],
        through: str = "softmax",
        wanted: bool = True,
    ) -> None:
        self._through = choice("through", through, ("softmax", "sigmoid"))
        self._wanted = flag("wanted", wanted)
        if not isinstance(columns, (list, tuple)) or not columns or len(set(map(repr, columns))) != len(columns):
            raise RewardError(f"'columns' is {columns!r}; give a list of different columns, counted from 0")
        if not isinstance(folder, (str, os.PathLike, OnnxReward)):
            raise RewardError(f"'folder' is {folder!r}; give the path of a reward folder")
        self._model = folder if isinstance(folder, OnnxReward) else OnnxReward.load(folder)
        width = self._model.outputs("a", ["a"]).shape[1]
        self._columns = [whole("columns", column, 0, width - 1) for column in columns]
        if self._through == "softmax" and len(set(self._columns)) == width:
            raise RewardError(
                f"'columns' are all {width} of the model: their softmax is always 1; use fewer or sigmoid"
            )
        self.name = self._model.name
        self.prefix = self._model.prefix

    def score(self, prompt: Prompt, responses: Sequence[str]) -> npt.NDArray[np.float32]:
        logits = self._model.outputs(prompt, responses).astype(np.float64)
        if self._through == "softmax":
            e = np.exp(logits - logits.max(axis=1, keepdims=True))
            p = e[:, self._columns].sum(axis=1) / e.sum(axis=1)
        else:
            p = (0.5 * (1.0 + np.tanh(0.5 * logits[:, self._columns]))).max(axis=1)
        return np.asarray(p - 1.0 if self._wanted else -p, np.float32)

    def one(self, text: str) -> float:
        return float(self.score("", [text])[0])
