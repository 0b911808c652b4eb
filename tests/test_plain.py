"""Plain generation: many prompts in one batch, without a reward."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from aisp_local import CapacityError, InputError, LlamaEngine, Sample, Sampling, shipped
from aisp_local.seeds import RowSeeds
from aisp_local.types import Controls, Message

pytestmark = pytest.mark.native

CHAT: list[Message] = [{"role": "user", "content": "Tell me a story about a fox."}]
PROMPTS: list[Any] = [CHAT, "Once upon a time", "The little dog"]


@pytest.fixture(scope="module")
def engine() -> Iterator[LlamaEngine]:
    with LlamaEngine(shipped.model(), threads=1) as made:
        yield made


def texts(found: list[list[Sample]]) -> list[list[str]]:
    return [[sample.text for sample in samples] for samples in found]


def test_samples_are_those_of_each_prompt_alone(engine: LlamaEngine) -> None:
    together = engine.generate(PROMPTS, n=3, max_tokens=16, seed=4)
    assert [len(samples) for samples in together] == [3, 3, 3]
    warm = Controls(3, sampling=Sampling(0.8, top_p=0.95, min_p=0.05))
    alone = engine.rollout(PROMPTS[1], warm, max_tokens=16, seeds=RowSeeds(4, 1))
    assert texts(together)[1] == list(alone.texts) and len(set(alone.texts)) == 3
    assert texts(engine.generate(PROMPTS, n=3, max_tokens=16, seed=4, at_once=1)) == texts(together)
    assert texts(engine.generate(PROMPTS, n=3, max_tokens=16, seed=5)) != texts(together)


def test_greedy_samples_end_where_they_are_told_to(engine: LlamaEngine) -> None:
    ((whole,),) = engine.generate([CHAT], temperature=0, max_tokens=12)
    assert whole.finish_reason == "length" and len(whole.tokens) == 12 and whole.logprobs is None
    ((short,),) = engine.generate([CHAT], temperature=0, max_tokens=12, stop_strings="fox", logprobs=True)
    assert short.finish_reason == "stop" and short.text == whole.text.split("fox")[0]
    assert short.logprobs is not None and short.logprobs.shape == short.tokens.shape
    assert (short.logprobs <= 0).all() and np.isfinite(short.logprobs).all()


def test_samples_are_held_to_a_grammar(engine: LlamaEngine) -> None:
    found = engine.generate(PROMPTS, n=2, grammar='root ::= "yes" | "no"')
    assert {sample.text for samples in found for sample in samples} <= {"yes", "no"}
    schema = {"type": "object", "properties": {"legs": {"enum": [2, 4]}}, "required": ["legs"]}
    for _, samples in engine.stream(["A fox:"], n=2, max_tokens=40, grammar=schema):
        assert all(json.loads(sample.text)["legs"] in (2, 4) for sample in samples)


def test_more_prompts_than_the_cache_holds_at_a_time(engine: LlamaEngine) -> None:
    prompts = [f"The number {i} is" for i in range(40)]
    found = engine.generate(prompts, n=1, max_tokens=4, temperature=0)
    assert texts(found[7:8]) == texts(engine.generate(prompts[7:8], max_tokens=4, temperature=0))
    assert all(len(samples) == 1 for samples in found)
    assert engine.generate([], n=2) == []


def test_prompts_come_as_they_finish(engine: LlamaEngine) -> None:
    found = dict(engine.stream(PROMPTS, n=2, max_tokens=12, seed=4))
    assert texts([found[i] for i in range(3)]) == texts(engine.generate(PROMPTS, n=2, max_tokens=12, seed=4))


def test_a_closed_iterator_stops(engine: LlamaEngine) -> None:
    stream = engine.stream(["One", *["Once upon a time"] * 400], n=16, max_tokens=200, at_once=1)
    next(stream)
    began = time.monotonic()
    stream.close()
    assert time.monotonic() - began < 5
    assert engine.generate(["One"], max_tokens=2)[0][0].text


def test_the_engine_of_a_loop_is_free_between_two_prompts(engine: LlamaEngine) -> None:
    with pytest.raises(ZeroDivisionError):
        for _ in engine.stream(["One", "Two"], max_tokens=200):
            1 / 0  # noqa: B018
    assert engine.generate(["One"], max_tokens=2)[0][0].text


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ("Once", {}, "that is one prompt; give a list"),
        (CHAT, {}, "that is one prompt; give a list"),
        (["Once", "word " * 9000], {}, r"prompt 2 has \d+ tokens and the model's context \d+; shorten it"),
        (["Once"], {"n": 0}, "0 rollouts were asked for"),
        (["Once"], {"max_tokens": 0}, "max_tokens is 0"),
        (["Once"], {"at_once": 0}, "at_once is 0 prompts"),
        (["Once"], {"temperature": -1}, "temperature is -1"),
        (["Once"], {"stop_strings": [""]}, "a stop string is empty"),
        (["Once"], {"seed": -1}, "the seed is -1"),
        (["Once", " "], {}, "the prompt is empty"),
    ],
)
def test_what_is_refused(engine: LlamaEngine, prompts: Any, options: dict[str, Any], message: str) -> None:
    kind = CapacityError if "shorten" in message else InputError
    with pytest.raises(kind, match=message):
        engine.generate(prompts, **options)
    with pytest.raises(kind, match=message):
        list(engine.stream(prompts, **options))
