"""How fast this machine is with a model and a reward, in about ten seconds, and how large a search it affords."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from aisp_local.api import Aligner
from aisp_local.controllers.blocks import Schedule
from aisp_local.defaults import DEFAULT_MAX_TOKENS, DEFAULT_METHOD, EFFORT, rollouts_an_iteration
from aisp_local.engine import LlamaEngine
from aisp_local.errors import CapacityError
from aisp_local.host import available_memory
from aisp_local.measure import calibrated
from aisp_local.native import MAX_SEQUENCES
from aisp_local.rewards import Reward
from aisp_local.rewards.base import call_parts, call_prefixes
from aisp_local.seeds import RowSeeds
from aisp_local.types import Controls, Rollouts, Sampling

AT_ONCE = (1, 8, 32)
SECONDS = 2.0  # of each measurement; twice as many at most
_BATCH = 8  # texts that a search has the reward read at a time
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
    scores_per_s: float  # texts of the lengths that a search has the reward read
    n_scored: int  # of them for each rollout of the default method
    most_at_once: int | None  # rollouts that the memory has room for; None where that is not known
    searches: tuple[Search, ...]


def measure(aligner: Aligner, engine: LlamaEngine, say: Callable[[str], None]) -> Speed:
    """Decode and score for about ten seconds. ``say`` is told what is measured next.

    Raises CapacityError when the memory has no room for one rollout, DecodeError and ScoreError.
    """
    room = most_at_once(engine)
    if room == 0:
        raise CapacityError(f"the memory has no room for one rollout of {DEFAULT_MAX_TOKENS} tokens; free some")
    rates: dict[int, float] = {}
    some: Rollouts | None = None
    for n in reversed([n for n in AT_ONCE if room is None or n <= room]):  # the largest context first
        say(f"measuring {n} rollout{'s' if n > 1 else ''} at once")
        rates[n], rollouts = _decode(engine, n)
        some = some or rollouts
    assert some is not None
    say("measuring the reward")
    reward = calibrated(engine, aligner.reward, _PROMPT, max_tokens=_TOKENS, seed=0)
    unfinished = getattr(reward, "unfinished", True)
    first, later = _read_at(unfinished)
    seconds = _reading(engine, reward, some, sorted({*first, *later}))
    of_first, of_later = (sum(seconds[at] for at in positions) for positions in (first, later))
    each = engine.model.kv_bytes_per_token * DEFAULT_MAX_TOKENS
    sizes = sorted(rates)
    searches = []
    for effort, budget in EFFORT.items():
        n = min(budget, rollouts_an_iteration(DEFAULT_METHOD, budget, unfinished))
        at_once = min(n, room or MAX_SEQUENCES)
        step = float(np.interp(at_once, sizes, [size / rates[size] for size in sizes]))
        # The reward is asked where rollouts pause, so that nothing is decoded meanwhile, or it takes the same cores.
        took = budget / at_once * DEFAULT_MAX_TOKENS * step + n * of_first + (budget - n) * of_later
        searches.append(Search(effort, budget, took, n * each, room is None or n <= room))
    return Speed(dict(sorted(rates.items())), len(first) / of_first, len(first), room, tuple(searches))


def _read_at(unfinished: bool) -> tuple[list[int], list[int]]:
    """The lengths in tokens at which the default method has a rollout read: of the first iteration, and of later ones.

    All rollouts have full length.
    """
    schedule, found = Schedule(DEFAULT_MAX_TOKENS), list[list[int]]()
    for _ in range(2):
        positions, at = list[int](), schedule.pause(0) if unfinished else None
        while at is not None:
            positions.append(at)
            at = schedule.pause(at)
        found.append([*positions, DEFAULT_MAX_TOKENS])
        schedule.learn([DEFAULT_MAX_TOKENS])
    return found[0], found[1]


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
    controls = Controls(
        n,
        np.zeros((n, 1, engine.d), np.float32),
        held=True,
        sampling=Sampling(1.0, min_p=0.02),
        want=frozenset({"laws"}),
    )
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


def _reading(engine: LlamaEngine, reward: Reward, some: Rollouts, lengths: Sequence[int]) -> dict[int, float]:
    """Seconds that the reward takes for a text of each of these lengths in tokens, in batches as a search has them.

    Three lengths are measured, the longest first, or that alone where one text takes longer than all may.
    """
    drawn = [tokens for tokens in some.tokens if len(tokens)][:_BATCH] or [np.zeros(1, np.int32)]
    measured: dict[int, float] = {}
    for length in sorted({lengths[0], lengths[len(lengths) // 2], lengths[-1]}, reverse=True):
        texts = [engine.text(np.resize(tokens, length)) for tokens in drawn]
        score: Callable[..., object] = call_parts if length == lengths[-1] else call_prefixes
        if not measured:
            began = time.perf_counter()
            score(reward, _PROMPT, texts[:1])
            took = time.perf_counter() - began
            if took >= SECONDS:
                return {each: took * each / length for each in lengths}
        began, scored = time.perf_counter(), 0
        while not scored or time.perf_counter() - began < SECONDS / 3:
            score(reward, _PROMPT, texts)
            scored += len(texts)
        measured[length] = (time.perf_counter() - began) / scored
    known = sorted(measured)
    return dict(zip(lengths, np.interp(lengths, known, [measured[each] for each in known]).tolist(), strict=True))
