"""Plain generation: many prompts, n samples of each, no control and no reward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from aisp_local.engine.base import Engine, Job, check_room
from aisp_local.engine.prompts import check_prompts
from aisp_local.errors import InputError
from aisp_local.grammar import Grammar
from aisp_local.seeds import RowSeeds
from aisp_local.types import Controls, FinishReason, FloatArray, Prompt, Rollouts, Sampling

_ROWS = 32
"""That decode at once where nothing else is said: beyond it a step takes nearly as long for each row more."""


@dataclass(frozen=True, eq=False)
class Sample:
    """A response of the model alone. ``tokens`` [T] has the end-of-generation token where it was drawn, the text not.

    ``logprobs`` [T]: log-probability (nats) of each token at temperature 1, without truncation; None unless asked for.
    """

    text: str
    tokens: npt.NDArray[np.int32]
    finish_reason: FinishReason
    logprobs: FloatArray | None = None


@dataclass(frozen=True)
class Request:
    """What is asked of each prompt; see ``LlamaEngine.generate``."""

    n: int
    max_tokens: int
    sampling: Sampling
    seed: int
    stop_strings: Sequence[str]
    grammar: Grammar | None
    logprobs: bool
    at_once: int | None

    @classmethod
    def of(
        cls,
        n: int,
        max_tokens: int,
        sampling: Sampling,
        seed: int,
        stop_strings: Sequence[str],
        grammar: Grammar | str | Mapping[str, Any] | None,
        logprobs: bool,
        at_once: int | None,
    ) -> Request:
        """With a grammar in any form."""
        held = None if grammar is None else Grammar.of(grammar)
        return cls(n, max_tokens, sampling, seed, stop_strings, held, logprobs, at_once)


def run(
    engine: Engine,
    prompts: Sequence[Prompt],
    request: Request,
    done: Callable[[int, list[Sample]], None],
    stop: Callable[[], bool],
) -> None:
    """Give ``done(i, samples)`` the samples of ``prompts[i]`` once all of them have ended, until ``stop()``."""
    check_prompts(prompts)
    if request.at_once is not None and request.at_once < 1:
        raise InputError(f"at_once is {request.at_once} prompts; it must be at least 1")
    for i, prompt in enumerate(prompts):
        check_room(engine, prompt, f"prompt {i + 1}")
    jobs = [
        Job(
            prompt,
            Controls(request.n, sampling=request.sampling),
            request.max_tokens,
            RowSeeds(request.seed, i),
            request.stop_strings,
            frozenset(("logprobs",) if request.logprobs else ()),
            request.grammar,
        )
        for i, prompt in enumerate(prompts)
    ]
    for job in jobs:
        job.check(engine.d)
    if jobs:
        together = min(len(jobs), request.at_once or max(1, _ROWS // request.n))
        feed = _Samples(jobs, done, stop)
        engine.run(feed, prompts=prompts, n=together * request.n, max_tokens=request.max_tokens, at_once=together)


class _Samples:
    """A feed of one job a prompt, in their order."""

    def __init__(
        self, jobs: Sequence[Job], done: Callable[[int, list[Sample]], None], stop: Callable[[], bool]
    ) -> None:
        self._jobs, self._begun = jobs, 0
        self._done, self.stop = done, stop

    def next(self, idle: bool) -> Job | None:
        if self._begun == len(self._jobs) or self.stop():
            return None
        self._begun += 1
        return self._jobs[self._begun - 1]

    def ready(self) -> bool:
        return True

    def stepped(self, job: Job, step: int, rows: int, n_tokens: int) -> None:
        pass

    def ended(self, job: Job, row: int, text: str, paused: bool) -> None:
        pass

    def finished(self, job: Job, rollouts: Rollouts) -> None:
        logprobs: Sequence[FloatArray | None] = rollouts.base_logprobs or [None] * len(rollouts)
        rows = zip(rollouts.texts, rollouts.tokens, rollouts.finish_reasons, logprobs, strict=True)
        self._done(job.seeds.prompt_index, [Sample(*row) for row in rows])
