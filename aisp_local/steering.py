"""What a search learnt, kept for another one with the same model."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from aisp_local.errors import InputError
from aisp_local.files import read_text, write_output
from aisp_local.types import FloatArray

_FORMAT = 1
_LARGEST = 1e30


@dataclass(frozen=True, eq=False)
class Steering:
    """A control u [d] that is held at all steps, and the fingerprint of the model to whose pre-logits it is added."""

    u: FloatArray
    model: str
    reward: str = ""  # the name of the one that it was learnt from
    nats: float | None = None  # of a response under it, where it was learnt; None: not known

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file, whole or not at all. Raises InputError where that cannot be."""
        content = {
            "format": _FORMAT,
            "model": self.model,
            "reward": self.reward,
            "nats": self.nats,
            "u": [round(float(value), 7) for value in self.u],
        }
        write_output(Path(path), json.dumps(content) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Steering:
        """What ``save`` wrote. Raises InputError for anything else."""
        text = read_text(Path(path), "check the path of the steering, or write one with --save-steering")
        try:
            content = json.loads(text)
        except (ValueError, RecursionError):
            content = None
        values, nats = (content.get("u"), content.get("nats")) if isinstance(content, dict) else (None, None)
        if (
            not isinstance(values, list)
            or content.get("format") != _FORMAT
            or not isinstance(content.get("model"), str)
            or not all(isinstance(v, int | float) and -_LARGEST < v < _LARGEST for v in values)
            or not (nats is None or (isinstance(nats, int | float) and 0 <= nats < _LARGEST))
        ):
            raise InputError(f"{path} holds no steering of this version; write one with --save-steering")
        kept = None if nats is None else float(nats)
        return cls(np.array(values, np.float32), content["model"], str(content.get("reward", "")), kept)
