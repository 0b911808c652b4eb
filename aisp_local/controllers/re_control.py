"""RE-Control: gradient steps on the pre-logits of every step, up a learnt value function (arXiv 2406.05954)."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from aisp_local.errors import InputError
from aisp_local.types import ControllerInfo, Controls, FloatArray, Head, Rollouts, Sampling, Step

Array = npt.NDArray[np.float64]


class Value:
    """A value function of pre-logits: ``V(z) = w . relu(A z + b) + c``, the reward that a response will have."""

    def __init__(self, a: FloatArray, b: FloatArray, w: FloatArray, c: FloatArray) -> None:
        if a.ndim != 2 or b.shape != a.shape[:1] or w.shape != b.shape or c.shape != (1,):
            raise InputError(
                f"a value function has A [h, d], b [h], w [h] and c [1]; found {[x.shape for x in (a, b, w, c)]}"
            )
        if not all(np.isfinite(x).all() for x in (a, b, w, c)):
            raise InputError("the value function holds values that are not finite")
        self.a, self.b, self.w, self.c = (np.asarray(x, np.float32) for x in (a, b, w, c))

    @property
    def d(self) -> int:
        return int(self.a.shape[1])

    def __call__(self, z: FloatArray) -> FloatArray:
        """Values [m] of pre-logits [m, d]."""
        return np.asarray(np.maximum(z @ self.a.T + self.b, 0.0) @ self.w + self.c[0])

    def gradient(self, z: FloatArray) -> FloatArray:
        """dV/dz [m, d]."""
        return np.asarray(((z @ self.a.T + self.b > 0) * self.w) @ self.a)

    def save(self, path: str | os.PathLike[str]) -> None:
        from safetensors.numpy import save

        from aisp_local.files import write_output

        write_output(Path(path), save({"a": self.a, "b": self.b, "w": self.w, "c": self.c}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Value:
        """What ``save`` wrote: safetensors, which hold numbers only. Raises InputError for anything else."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        from aisp_local.files import read_bytes

        try:
            tensors = load(read_bytes(Path(path), "check the path of the value function"))
        except SafetensorError as error:
            raise InputError(f"{path} is no value function ({error}); give one that `bench value` wrote") from error
        missing = sorted({"a", "b", "w", "c"} - set(tensors))
        if missing:
            raise InputError(f"{path} holds no value function: {missing[0]} is missing")
        return cls(*(tensors[name] for name in ("a", "b", "w", "c")))


class ReControl:
    """At every step ``z <- z + rate * dV/dz``, so many ``steps`` times, before the output matrix.

    Options: ``value`` (a Value or its file: learnt for one model and reward, see ``aisp-local bench value``), ``rate``,
    ``steps``, ``temperature``, ``top_p``, ``min_p``.
    """

    name = "re-control"

    def __init__(
        self,
        *,
        d: int,
        max_tokens: int,
        seed: int,
        head: Head | None = None,
        prompt_index: int = 0,
        value: Value | str | os.PathLike[str] | None = None,
        rate: float = 1.0,
        steps: int = 30,
        temperature: float = 1.0,
        top_p: float = 1.0,
        min_p: float = 0.02,
    ) -> None:
        if not math.isfinite(rate):
            raise InputError(f"rate is {rate}; it must be a number")
        if steps < 0:
            raise InputError(f"steps is {steps}; it must be 0 or greater")
        self._sampling = Sampling(temperature, top_p=top_p, min_p=min_p)
        self._head, self._rate, self._steps = head, rate, steps
        self._value = value if isinstance(value, Value) or value is None else Value.load(value)
        if head is not None:  # a search begins
            if self._value is None:
                raise InputError("re-control needs a value function; train one with aisp-local bench value")
            if self._value.d != d:
                raise InputError(f"the value function is of pre-logits {self._value.d} wide; the model's are {d}")

    @property
    def needs_prelogits(self) -> bool:
        return True

    def ask(self, n: int) -> Controls:
        return Controls(n=n, sampling=self._sampling, processor=self)

    def __call__(self, step: Step) -> FloatArray:
        """Logits of the moved pre-logits; see types.LogitsProcessor."""
        assert step.prelogits is not None
        if self._value is None or self._head is None:
            raise InputError("re-control was made without a value function or a model's head")
        z = np.array(step.prelogits, np.float32)
        for _ in range(self._steps):
            z += np.float32(self._rate) * self._value.gradient(z)
        return self._head.logits(z)

    def tell(self, rollouts: Rollouts, rewards: Array) -> ControllerInfo:
        return ControllerInfo()
