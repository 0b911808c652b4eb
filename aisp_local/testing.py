"""Public fakes of the seams, for tests of controllers, rewards and drivers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from aisp_local.controllers.re_control import Value
from aisp_local.engine.base import Feed, Job
from aisp_local.engine.law import HeadLaw
from aisp_local.engine.sampling import log_law, log_softmax, pick, sparse_law
from aisp_local.errors import InputError
from aisp_local.grammar import Grammar
from aisp_local.rewards.function import CallableReward
from aisp_local.seeds import RowSeeds
from aisp_local.types import Controls, FinishReason, FloatArray, Laws, Prompt, Rollouts, Step, Want

__all__ = ["FakeEngine", "FakeReward", "needed"]

FakeReward = CallableReward


def needed(method: str, d: int) -> dict[str, Any]:
    """Options without which a method does not run, on a model with pre-logits of width ``d``."""
    if method != "re-control":
        return {}
    rng = np.random.default_rng(0)
    a, b, w, c = (rng.standard_normal(shape).astype(np.float32) for shape in ((16, d), (16,), (16,), (1,)))
    return {"value": Value(a, b, w, c), "rate": 0.1, "steps": 3}


class _Head(HeadLaw):
    def __init__(self, weight: FloatArray) -> None:
        self._weight = weight

    @property
    def weight(self) -> FloatArray:
        return self._weight

    def logits(self, prelogits: FloatArray) -> FloatArray:
        return np.asarray(prelogits @ self._weight.T)


class FakeEngine:
    """A bigram language model in numpy: ``z`` is a fixed embedding of the last token, logits ``W (z + v)``.

    Token 0 ends a response; token i is the letter a, b, ... The prompt is ignored: generation starts at 1.
    All else is as LlamaEngine has it: stop strings, what is refused, and what ``want`` reports.
    """

    def __init__(self, *, d: int = 8, vocabulary: int = 12, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self._z = rng.standard_normal((vocabulary, d)).astype(np.float32)
        self._w = rng.standard_normal((vocabulary, d)).astype(np.float32)
        self.offloaded = False  # set it, and the driver takes the processor for idle while rows decode

    @property
    def d(self) -> int:
        return int(self._z.shape[1])

    @property
    def head(self) -> HeadLaw:
        return _Head(self._w)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self._w.tobytes()).hexdigest()

    @property
    def n_ctx(self) -> int:
        return 4096

    def room(self, prompt: Prompt) -> int:
        return self.n_ctx - sum(len(m) if isinstance(m, str) else len(m["content"]) for m in prompt)

    def text(self, tokens: npt.NDArray[np.int32]) -> str:
        return _text(tokens.tolist())

    def piece(self, token: int) -> bytes:
        return _text([token]).encode()

    def check_grammar(self, grammar: Grammar) -> None:
        raise InputError("the bigram model follows no grammar")

    def run(
        self, feed: Feed, *, prompts: Sequence[Prompt], n: int, max_tokens: int, at_once: int | None = None
    ) -> None:
        """See engine.base.Engine. One job after the other: it has no rows to share."""
        while (job := feed.next(idle=True)) is not None:
            out = self.rollout(
                job.prompt,
                job.controls,
                max_tokens=job.max_tokens,
                seeds=job.seeds,
                stop_strings=job.stop_strings,
                want=job.want,
                should_stop=feed.stop,
                grammar=job.grammar,
                on_step=partial(feed.stepped, job),
            )
            for row, reason in enumerate(out.finish_reasons):
                if reason != "interrupted":
                    feed.ended(job, row, out.texts[row], reason == "paused")
            feed.finished(job, out)

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
        grammar: Grammar | None = None,
    ) -> Rollouts:
        """See engine.base.Engine. Raises InputError for what no engine can do."""
        job = Job(prompt, controls, max_tokens, seeds, stop_strings, want, grammar)
        if grammar is not None:
            self.check_grammar(grammar)
        job.check(self.d)
        n, want = controls.n, job.want
        tokens: list[list[int]] = [[] for _ in range(n)]
        reasons: list[FinishReason] = ["interrupted"] * n
        logprobs: list[list[float]] = [[] for _ in range(n)]
        prelogits: list[list[npt.NDArray[np.float32]]] = [[] for _ in range(n)]
        laws: list[tuple[int, int, int, float, float]] = []
        kl = np.zeros(n, np.float32)
        uniforms = [seeds.generator(i, "sampling").random(max_tokens) for i in range(n)]
        prefixes = [self._prefix(controls, i, max_tokens) for i in range(n)]
        given = [0 if want & {"logprobs", "prelogits"} else len(prefix) for prefix in prefixes]  # read at once
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
                if controls.processor is not None:
                    so_far = [np.array(tokens[i], np.int32)]
                    shown = z[None] if controls.processor.needs_prelogits else None
                    logits = controls.processor(Step(np.array([i], np.int64), so_far, logits, shown))
                token = int(pick(logits, controls.sampling, uniforms[i][step : step + 1])[0])
                prefix = prefixes[i]
                if step < len(prefix):
                    token = prefix[step]
                tokens[i].append(token)
                prelogits[i].append(z)
                if step >= len(prefix):
                    _, *law = sparse_law(logits, controls.sampling, controls.shift)
                    laws += [(i, step, int(t), float(p), float(q)) for t, p, q in zip(*law, strict=True)]
                logprobs[i].append(float(log_softmax(base.astype(np.float64))[0, token]))
                if step >= len(prefix):
                    p = log_law(logits, controls.sampling)[0]
                    q = log_softmax(base.astype(np.float64))[0]
                    kl[i] += float((np.exp(p) * np.where(np.isneginf(p), 0, p - q)).sum())
                if token == 0 or any(stop in _text(tokens[i]) for stop in stop_strings):
                    reasons[i] = "stop"
                elif len(tokens[i]) == max_tokens:
                    reasons[i] = "length"
                elif len(tokens[i]) == controls.pause:
                    reasons[i] = "paused"
            if on_step is not None and step >= min(given):
                decoded = sum(max(0, len(row) - known) for row, known in zip(tokens, given, strict=True))
                on_step(step + 1 - min(given), reasons.count("interrupted"), decoded)
        return Rollouts(
            tokens=[np.array(t, np.int32) for t in tokens],
            texts=[_text(row, stop_strings) for row in tokens],
            finish_reasons=reasons,
            decode_seconds=0.0,
            n_tokens=sum(max(0, len(row) - known) for row, known in zip(tokens, given, strict=True)),
            base_logprobs=[np.array(row, np.float32) for row in logprobs] if "logprobs" in want else None,
            kl=kl if "kl" in want else None,
            prelogits=[np.array(rows, np.float32).reshape(-1, self.d) for rows in prelogits]
            if "prelogits" in want
            else None,
            laws=_laws(laws) if "laws" in want else None,
        )

    def _prefix(self, controls: Controls, row: int, max_tokens: int) -> list[int]:
        return [] if controls.prefixes is None else [int(token) for token in controls.prefixes[row][: max_tokens - 1]]

    def _control(self, controls: Controls, row: int, step: int) -> npt.NDArray[np.float32]:
        v = controls.vectors
        if v is None or (not controls.held and step >= v.shape[1]):
            return np.zeros(self.d, np.float32)
        return np.asarray(v[row, 0 if controls.held else step])


def _laws(entries: Sequence[tuple[int, int, int, float, float]]) -> Laws:
    row, step, token, p, base = zip(*entries, strict=True) if entries else ((), (), (), (), ())
    rows, steps, tokens = (np.array(column, np.int32) for column in (row, step, token))
    return Laws(rows, steps, tokens, np.array(p, np.float32), np.array(base, np.float32))


def _text(tokens: Sequence[int], stop_strings: Sequence[str] = ()) -> str:
    """The letters of the tokens, up to the first stop string."""
    text = "".join(chr(96 + token) for token in tokens if token)
    for stop in stop_strings:
        text = text.split(stop, 1)[0]
    return text
