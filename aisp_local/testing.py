"""Public fakes of the seams, for tests of controllers, rewards and drivers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from aisp_local.engine.base import Want
from aisp_local.engine.sampling import log_law, log_softmax, pick
from aisp_local.rewards.function import CallableReward
from aisp_local.seeds import RowSeeds
from aisp_local.types import Controls, FinishReason, Prompt, Rollouts

__all__ = ["FakeEngine", "FakeReward"]

FakeReward = CallableReward


class FakeEngine:
    """A bigram language model in numpy: ``z`` is a fixed embedding of the last token, logits ``W (z + v)``.

    Token 0 ends a response; token i is the letter a, b, ... The prompt is ignored: generation starts at 1.
    """

    def __init__(self, *, d: int = 8, vocabulary: int = 12, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self._z = rng.standard_normal((vocabulary, d)).astype(np.float32)
        self._w = rng.standard_normal((vocabulary, d)).astype(np.float32)

    @property
    def d(self) -> int:
        return int(self._z.shape[1])

    def rollout(
        self,
        prompt: Prompt,
        controls: Controls,
        *,
        max_tokens: int,
        seeds: RowSeeds,
        stop_strings: Sequence[str] = (),
        want: frozenset[Want] = frozenset(),
        should_stop: Callable[[], bool] | None = None,
        on_step: Callable[[int, int, int], None] | None = None,
    ) -> Rollouts:
        n = controls.n
        tokens: list[list[int]] = [[] for _ in range(n)]
        reasons: list[FinishReason] = ["interrupted"] * n
        logprobs: list[list[float]] = [[] for _ in range(n)]
        kl = np.zeros(n, np.float32)
        uniforms = [seeds.generator(i, "sampling").random(max_tokens) for i in range(n)]
        for step in range(max_tokens):
            if should_stop is not None and should_stop():
                break
            active = [i for i in range(n) if reasons[i] == "interrupted"]
            if not active:
                break
            for i in active:
                z = self._z[tokens[i][-1] if tokens[i] else 1]
                base = (self._w @ z)[None]
                logits = (self._w @ (z + self._control(controls, i, step)))[None]
                token = int(pick(logits, controls.sampling, uniforms[i][step : step + 1])[0])
                tokens[i].append(token)
                q = log_softmax(base.astype(np.float64))[0]
                p = log_law(logits, controls.sampling)[0]
                logprobs[i].append(float(q[token]))
                kl[i] += float((np.exp(p) * (np.where(np.isneginf(p), 0, p) - q)).sum())
                if token == 0:
                    reasons[i] = "stop"
                elif len(tokens[i]) == max_tokens:
                    reasons[i] = "length"
            if on_step is not None:
                on_step(step + 1, reasons.count("interrupted"), sum(map(len, tokens)))
        return Rollouts(
            tokens=[np.array(t, np.int32) for t in tokens],
            texts=["".join(chr(96 + t) for t in row if t) for row in tokens],
            finish_reasons=reasons,
            decode_seconds=0.0,
            n_tokens=sum(map(len, tokens)),
            base_logprobs=[np.array(row, np.float32) for row in logprobs] if "logprobs" in want else None,
            kl=kl if "kl" in want else None,
        )

    def _control(self, controls: Controls, row: int, step: int) -> npt.NDArray[np.float32]:
        v = controls.vectors
        if v is None or (not controls.held and step >= v.shape[1]):
            return np.zeros(self.d, np.float32)
        return np.asarray(v[row, 0 if controls.held else step])
