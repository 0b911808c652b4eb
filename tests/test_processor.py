"""Logits processors in the engine and the driver: what they may give, and what becomes of those who give nonsense."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from aisp_local import shipped
from aisp_local.controllers import BestOfN
from aisp_local.engine import LlamaEngine
from aisp_local.errors import InputError
from aisp_local.loop import Task, search_many
from aisp_local.seeds import RowSeeds
from aisp_local.testing import FakeEngine, FakeReward
from aisp_local.types import Controls, Message, Result, Sampling, Step

CHAT: list[Message] = [{"role": "user", "content": "Tell me a story about a fox."}]


class Processor:
    def __init__(self, function: Callable[[Step], Any]) -> None:
        self.function, self.needs_prelogits = function, False

    def __call__(self, step: Step) -> Any:
        return self.function(step)


class Processed(BestOfN):
    """Best-of-n through a processor."""

    def __init__(self, function: Callable[[Step], Any]) -> None:
        super().__init__(d=8, max_tokens=6, seed=0)
        self.function = function

    def ask(self, n: int) -> Controls:
        return Controls(n=n, sampling=Sampling(0.7), processor=Processor(self.function))


@pytest.fixture(scope="module")
def engine() -> Iterator[LlamaEngine]:
    with LlamaEngine(shipped.model(), threads=1) as made:
        yield made


NONSENSE: dict[str, tuple[Callable[[Step], Any], str]] = {
    "width": (lambda step: step.logits[:, :-1], "it must give floats of the shape"),
    "one row": (lambda step: step.logits[0], "it must give floats of the shape"),
    "words": (lambda step: "logits", "gave str"),
    "whole numbers": (lambda step: np.zeros(step.logits.shape, np.int64), "gave int64"),
    "NaN": (lambda step: np.full(step.logits.shape, np.nan, np.float32), "NaN or infinity"),
    "nothing to draw": (lambda step: np.full(step.logits.shape, -np.inf, np.float32), "without any token to draw"),
    "infinity": (lambda step: np.full(step.logits.shape, np.inf, np.float32), "NaN or infinity"),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_ends_its_own_search_alone(name: str) -> None:
    function, message = NONSENSE[name]
    bad, good = search_many(
        FakeEngine(),
        [Task("a", Processed(function)), Task("b", Processed(lambda step: step.logits), 1)],
        FakeReward(lambda prompt, texts: [float(len(text)) for text in texts]),
        method="best-of-n",
        budget=4,
        n=2,
        max_tokens=6,
        seed=0,
    )
    assert isinstance(bad, InputError) and message in str(bad) and isinstance(good, Result)


@pytest.mark.native
def test_a_given_token_may_be_one_that_must_not_be_drawn(engine: LlamaEngine) -> None:
    prefix = engine.model.tokenize("Once upon a time", add_special=False, parse_special=False)

    def without(step: Step) -> Any:
        logits = step.logits.copy()
        logits[:, prefix] = -np.inf
        return logits

    controls = Controls(1, sampling=Sampling(0.8), prefixes=[prefix], processor=Processor(without))
    plain = engine.rollout(CHAT, controls, max_tokens=len(prefix) + 4, seeds=RowSeeds(0))
    told = engine.rollout(CHAT, controls, max_tokens=len(prefix) + 4, seeds=RowSeeds(0), want=frozenset({"logprobs"}))
    for rollouts in (plain, told):
        tokens = rollouts.tokens[0]
        assert tokens[: len(prefix)].tolist() == prefix.tolist()
        assert not np.isin(tokens[len(prefix) :], prefix).any()


@pytest.mark.native
def test_a_processor_cannot_change_what_was_decoded(engine: LlamaEngine) -> None:
    def scribbles(step: Step) -> Any:
        for tokens in step.tokens:
            tokens[:] = 7
        return step.logits

    options: dict[str, Any] = {"max_tokens": 8, "seeds": RowSeeds(0)}
    plain = engine.rollout(CHAT, Controls(2, sampling=Sampling(0.8)), **options)
    written = engine.rollout(CHAT, Controls(2, sampling=Sampling(0.8), processor=Processor(scribbles)), **options)
    assert [t.tolist() for t in plain.tokens] == [t.tolist() for t in written.tokens]
