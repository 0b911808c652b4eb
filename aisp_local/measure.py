"""What is measured on the base model for a composite reward before a search, and what a judge says after it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

from aisp_local.engine import Engine
from aisp_local.errors import AispError
from aisp_local.grammar import Grammar
from aisp_local.rewards import Reward
from aisp_local.rewards.base import Calibrates, call
from aisp_local.rewards.interruption import AbandonedError, Interruption, interruptible
from aisp_local.seeds import RowSeeds
from aisp_local.types import Calibration, Controls, Prompt, Result, Sampling

_SAMPLING = Sampling(temperature=0.7)  # as best-of-n samples


def calibrated(
    engine: Engine,
    reward: Reward,
    prompt: Prompt,
    *,
    max_tokens: int,
    seed: int,
    prompt_index: int = 0,
    stop_strings: Sequence[str] = (),
    grammar: Grammar | None = None,
    stop: Callable[[], bool] | None = None,
) -> Reward:
    """The reward, calibrated on responses of the base model to the prompt if it has to be.

    They are those of the iteration 0, which no search has: the same for the same seed and prompt. Raises
    KeyboardInterrupt if ``stop()`` cut them short, and what the engine and the reward raise.
    """
    if not isinstance(reward, Calibrates) or not reward.uncalibrated:
        return reward
    rollouts = engine.rollout(
        prompt,
        Controls(n=reward.rollouts, sampling=_SAMPLING),
        max_tokens=max_tokens,
        seeds=RowSeeds(seed, prompt_index, iteration=0),
        stop_strings=stop_strings,
        should_stop=stop,
        grammar=grammar,
    )
    if "interrupted" in rollouts.finish_reasons:
        raise KeyboardInterrupt
    try:
        with interruptible(Interruption(stop)):
            return reward.calibrate(prompt, list(rollouts.texts))
    except AbandonedError:
        raise KeyboardInterrupt from None


def calibration_of(reward: Reward) -> Calibration | None:
    return reward.calibration if isinstance(reward, Calibrates) else None


def judged(result: Result, judge: Reward, prompt: Prompt, every: bool) -> Result:
    """The result with the judge's score of its answer and baseline, and of ``every`` candidate if asked for.

    A judge that fails costs its own scores and no answer: it warns.
    """
    unaligned = result.baseline
    asked = list(result.candidates) if every else [result.candidates[0]]  # the answer's comes first
    texts = [candidate.text for candidate in asked] + ([] if unaligned is None else [unaligned.text])
    try:
        scores = [float(score) for score in call(judge.name, judge.score, prompt, texts)]
    except AispError as error:
        warnings.warn(f"the judge {judge.name!r} gave no scores: {error}", stacklevel=2)
        return replace(result, judge_model=judge.name)
    of = {id(candidate): score for candidate, score in zip(asked, scores, strict=False)}
    return replace(
        result,
        judge_model=judge.name,
        judge=scores[0],
        candidates=tuple(replace(c, judge=of.get(id(c))) for c in result.candidates),
        baseline=None if unaligned is None else replace(unaligned, judge=scores[-1]),
    )
