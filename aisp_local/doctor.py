"""How fast this machine is with a model and a reward, in about ten seconds, and how large a search it affords."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from aisp_local.api import Aligner
from aisp_local.controllers.blocks import BLOCKS
from aisp_local.defaults import DEFAULT_MAX_TOKENS, EFFORT
from aisp_local.engine import LlamaEngine
from aisp_local.errors import CapacityError
from aisp_local.host import available_memory
from aisp_local.measure import calibrated
from aisp_local.native import MAX_SEQUENCES
from aisp_local.rewards import Reward
from aisp_local.seeds import RowSeeds
from aisp_local.types import Controls, Rollouts, Sampling

AT_ONCE = (1, 8, 32)
SECONDS = 2.0  # of each measurement; twice as many at most
_PROMPT = "Tell me a story about a fox who wanted to see the sea."
_TOKENS = 128


@dataclass(frozen=True)
class Search:
    """A search of ``rollouts`` responses of ``DEFAULT_MAX_TOKENS``: about how long it takes, its KV cache in bytes."""

    effort: str
    rollouts: int
    seconds: float
    cache_bytes: int
    fits: bool


@dataclass(frozen=True)
class Speed:
    """What was measured. ``tokens_per_s``: by how many rollouts decode at once, under a control."""

    tokens_per_s: dict[int, float]
    scores_per_s: float
    n_scored: int  # texts that the default method has the reward read for each rollout
    most_at_once: int | None  # rollouts that the memory has room for; None where that is not known
    searches: tuple[Search, ...]


def measure(aligner: Aligner, engine: LlamaEngine, say: Callable[[str], None]) -> Speed:
    """Decode and score for about ten seconds. ``say`` is told what is measured next.

    Raises CapacityError when the memory has no room for one rollout, DecodeError and ScoreError.
    """
    room = most_at_once(engine)
    if room == 0:
        raise CapacityError(f"the memory has no room for one rollout of {DEFAULT_MAX_TOKENS} tokens; free some")
    rates, texts = {}, [""]
    for n in reversed([n for n in AT_ONCE if room is None or n <= room]):  # the largest context first
        say(f"measuring {n} rollout{'s' if n > 1 else ''} at once")
        rates[n], rollouts = _decode(engine, n)
        if len(rollouts.texts) > len(texts) or texts == [""]:
            texts = list(rollouts.texts)
    say("measuring the reward")
    reward = calibrated(engine, aligner.reward, _PROMPT, max_tokens=_TOKENS, seed=0)
    parts = 1 + BLOCKS if getattr(reward, "unfinished", True) else 1
    scores = _score(reward, texts, parts)
    each = engine.model.kv_bytes_per_token * DEFAULT_MAX_TOKENS
    searches = []
    for effort, rollouts_ in EFFORT.items():
        at_once = min(rollouts_, room or MAX_SEQUENCES, max(AT_ONCE))
        rate = rates[max(n for n in rates if n <= at_once)]
        seconds = rollouts_ * (DEFAULT_MAX_TOKENS / rate + parts / scores)
        n = min(rollouts_, max(AT_ONCE))
        searches.append(Search(effort, rollouts_, seconds, n * each, room is None or n <= room))
    return Speed(dict(sorted(rates.items())), scores, parts, room, tuple(searches))


def most_at_once(engine: LlamaEngine) -> int | None:
    """Rollouts of ``DEFAULT_MAX_TOKENS`` tokens that the memory has room for now, and llama.cpp sequences."""
    memory, each = available_memory(), engine.model.kv_bytes_per_token * DEFAULT_MAX_TOKENS
    if memory is None or each == 0:
        return None
    return min(MAX_SEQUENCES - 1, memory // each)


def _decode(engine: LlamaEngine, n: int) -> tuple[float, Rollouts]:
    """Tokens a second of n rollouts under a held control of nothing, and the first of them.

    The first step of each call is left out: it waits for the prompt.
    """
    controls = Controls(n, np.zeros((n, 1, engine.d), np.float32), held=True, sampling=Sampling(1.0, min_p=0.02))
    began = time.perf_counter()
    tokens, seconds = 0, 0.0
    first: Rollouts | None = None
    while first is None or time.perf_counter() - began < SECONDS:
        steps: list[tuple[float, int]] = []  # when each ended, and the tokens until then

        def late(steps: list[tuple[float, int]] = steps) -> bool:
            return len(steps) > 1 and time.perf_counter() - steps[0][0] >= 2 * SECONDS

        done = engine.rollout(
            [{"role": "user", "content": _PROMPT}],
            controls,
            max_tokens=min(_TOKENS, engine.n_ctx // 2),
            seeds=RowSeeds(0),
            should_stop=late,
            on_step=lambda _, __, n_tokens, steps=steps: steps.append((time.perf_counter(), n_tokens)),  # type: ignore[misc]
        )
        tokens += steps[-1][1] - steps[0][1]
        seconds += steps[-1][0] - steps[0][0]
        first = first or done
    return (tokens / seconds if tokens else first.n_tokens / first.decode_seconds), first


def _score(reward: Reward, texts: list[str], parts: int) -> float:
    """Texts a second, of the lengths that a search asks about: equal parts of responses."""
    rows = [text[: max(1, len(text) * part // parts)] for part in range(1, parts + 1) for text in texts[:8]]
    reward.score(_PROMPT, rows[:1])
    began, scored = time.perf_counter(), 0
    while scored == 0 or time.perf_counter() - began < SECONDS:
        for start in range(0, len(rows), 8):
            reward.score(_PROMPT, rows[start : start + 8])
            scored += len(rows[start : start + 8])
            if time.perf_counter() - began >= 2 * SECONDS:
                break
    return scored / (time.perf_counter() - began)
