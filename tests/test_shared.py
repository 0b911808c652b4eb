"""Calls of several threads in one batch: each is what it is alone, and none spoils another's."""

from __future__ import annotations

import importlib.util
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from os.path import commonprefix
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic

from aisp_local import Aligner, shipped
from aisp_local.engine import LlamaEngine, SharedEngine
from aisp_local.engine.decode import Decoder
from aisp_local.errors import CapacityError, DecodeError, InputError
from aisp_local.native import Context
from aisp_local.seeds import RowSeeds
from aisp_local.testing import FakeReward
from aisp_local.types import Controls, Progress, Prompt, Result, Sampling

pytestmark = pytest.mark.native

ANIMALS = ("fox", "bear", "little red hen", "dog that sang", "mouse", "owl")
PROMPTS = [f"Once upon a time there was a {animal}" for animal in ANIMALS]
WARM = Sampling(temperature=0.8)


def vowels(prompt: Prompt, responses: Sequence[str]) -> list[float]:
    return [float(sum(c in "aeiou" for c in r)) for r in responses]


class Background:
    """A reward in a thread of its own; ``go``: it waits for that. ``broken``: what it raises for a prompt."""

    name, background = "background", True

    def __init__(self) -> None:
        self.go: dict[str, threading.Event] = {}
        self.broken: set[str] = set()

    def score(self, prompt: Prompt, responses: Sequence[str]) -> Any:
        assert isinstance(prompt, str)
        if prompt in self.go:
            assert self.go[prompt].wait(20)
        if prompt in self.broken:
            raise RuntimeError("broken")
        return vowels(prompt, responses)


@contextmanager
def sharing(together: int = 4, reward: Any = None, **options: Any) -> Iterator[tuple[Aligner, ThreadPoolExecutor]]:
    engine = SharedEngine(shipped.model(), threads=1, together=together, **options)
    with Aligner(engine, reward or FakeReward(vowels)) as aligner, ThreadPoolExecutor(8) as pool:
        yield aligner, pool


def key(result: Any) -> Any:
    assert isinstance(result, Result)
    return [(c.text, c.reward, c.iteration, c.row, c.n_tokens, c.logprob) for c in result.candidates]


def texts(result: Any) -> Any:
    assert isinstance(result, Result)
    return sorted((c.iteration, c.row, c.text) for c in result.candidates)


def common(found: Any, expected: Any) -> float:
    """Mean share of each rollout's text that is as expected, from its beginning on: rounding beside others may turn a
    near tie, and then the rest is another; how often depends on the processor's kernels."""
    assert [row[:2] for row in found] == [row[:2] for row in expected]
    pairs = [(a[2], b[2]) for a, b in zip(found, expected, strict=True)]
    return float(np.mean([len(commonprefix(pair)) / max(1, *map(len, pair)) for pair in pairs]))


ASKED: list[dict[str, Any]] = [
    {"method": "best-of-n", "budget": 8, "n": 4, "max_tokens": 30, "seed": 1},
    {"method": "score", "budget": 8, "n": 8, "max_tokens": 24, "seed": 2, "baseline": True},
    {"method": "aisp", "budget": 9, "n": 3, "max_tokens": 12, "seed": 3, "stop_strings": ["."]},
    {"method": "smc", "budget": 6, "n": 6, "max_tokens": 20, "seed": 4, "logprobs": True},
    {"method": "args", "budget": 2, "n": 2, "max_tokens": 6, "seed": 5},
    {"method": "best-of-n", "budget": 12, "n": 4, "max_tokens": 16, "seed": 6, "target_reward": 5.0},
]


class Batches:
    """Counts runs of the engine, and notes which rows each step had."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.runs = 0
        self.steps: list[int] = []
        share, decode = Decoder.share, Decoder._decode

        def counted(decoder: Decoder, *arguments: Any) -> None:
            self.runs += 1
            share(decoder, *arguments)

        def noted(decoder: Decoder, column: Any) -> None:
            self.steps.append(len(column.rows))
            decode(decoder, column)

        monkeypatch.setattr(Decoder, "share", counted)
        monkeypatch.setattr(Decoder, "_decode", noted)


def at_step(step: int, what: Callable[[], Any]) -> Callable[[Progress], None]:
    """``on_progress`` that does something after a decode step of the first iteration."""

    def progress(now: Progress) -> None:
        if now.step == step and now.iteration == 1 and now.stats is None:
            what()

    return progress


def until_joined(engine: SharedEngine, calls: int) -> Callable[[], None]:
    """Waits, in the thread that decodes, until so many calls wait for a turn."""

    def wait() -> None:
        end = time.monotonic() + 10
        while len(engine._queue) < calls:
            assert time.monotonic() < end
            time.sleep(0.001)

    return wait


def make_room(aligner: Aligner, pool: ThreadPoolExecutor, *asked: dict[str, Any]) -> None:
    """Has the context grow to what such calls need together: they come while another one decodes."""
    engine: Any = aligner.engine
    calls: list[Future[Result]] = []

    def come() -> None:
        calls.extend(pool.submit(aligner.generate, PROMPTS[0], **each) for each in asked)
        until_joined(engine, len(asked))()

    aligner.generate(PROMPTS[0], budget=1, max_tokens=4, on_progress=at_step(1, come))
    for call in calls:
        call.result()


def test_calls_of_any_kind_in_one_batch_are_what_each_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with Aligner(LlamaEngine(shipped.model(), threads=1), FakeReward(vowels)) as one:
        alone = [one.generate(prompt, **asked) for prompt, asked in zip(PROMPTS, ASKED, strict=True)]
    batches = Batches(monkeypatch)
    with sharing(together=6) as (aligner, pool):
        for _ in range(2):
            calls = [pool.submit(aligner.generate, p, **a) for p, a in zip(PROMPTS, ASKED, strict=True)]
            found = [call.result() for call in calls]
        assert max(batches.steps) >= 16
        same: list[bool] = []
        for asked, mine, other in zip(ASKED, found, alone, strict=True):
            same += [a == b for a, b in zip(texts(mine), texts(other), strict=True) if asked["method"] != "score"]
            # What score learns from a near tie that rounding turns turns all that comes after.
            assert asked["method"] == "score" or common(texts(mine), texts(other)) > 0.6
            assert mine.status == other.status and len(mine.iterations) == len(other.iterations)
            assert mine.rollouts == other.rollouts
            assert (mine.baseline is None) == (other.baseline is None)
            assert mine.baseline is None or mine.baseline.text == other.baseline.text
        assert np.mean(same) > 0.6


@pytest.mark.parametrize("asked", ASKED[:4])
def test_a_call_with_nobody_beside_it_is_to_the_bit_what_it_is_alone(asked: dict[str, Any]) -> None:
    with (
        Aligner(LlamaEngine(shipped.model(), threads=1), FakeReward(vowels)) as one,
        sharing(reward=FakeReward(vowels)) as (aligner, pool),
    ):
        assert key(aligner.generate(PROMPTS[0], **asked)) == key(one.generate(PROMPTS[0], **asked))
        make_room(aligner, pool, *[asked] * 3)
        for engine in (aligner.engine, one.engine):
            engine.forget()  # type: ignore[attr-defined]
        assert key(aligner.generate(PROMPTS[1], **asked)) == key(one.generate(PROMPTS[1], **asked))
        many = aligner.generate_many(PROMPTS[:3], **asked), one.generate_many(PROMPTS[:3], **asked)
        assert list(map(key, many[0])) == list(map(key, many[1]))


def test_beside_others_rounding_turns_only_draws_that_are_near_a_boundary() -> None:
    """As benchmarks/load.py tells an answer that rounding made another from one that is another client's."""
    path = Path(__file__).parents[1] / "benchmarks" / "load.py"
    spec = importlib.util.spec_from_file_location("load_benchmark", path)
    assert spec is not None and spec.loader is not None
    load = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(load)
    alone, clients = load.Alone(), range(8)

    def ask(i: int) -> Result:
        messages: Any = [{"role": "user", "content": load.prompt_of(i)}]
        return aligner.generate(messages, method="best-of-n", budget=load.ROWS, n=load.ROWS, max_tokens=24, seed=i)

    with sharing(together=6) as (aligner, pool):
        found = list(pool.map(ask, [*clients, *clients]))
    with Aligner(alone.engine, FakeReward(vowels)) as aligner:
        texts = [{one.row: one.text for one in ask(i).candidates} for i in clients]
        for i, result in zip([*clients, *clients], found, strict=True):
            for one in result.candidates:
                assert one.text == texts[i][one.row] or alone._drew(load.prompt_of(i), i, one.row - 1, one.text)
        # What another client was told is neither, however alike the prompts are.
        mistaken = 0
        for i in clients[:4]:
            assert alone.gave(load.prompt_of(i), i, found[i].answer)
            assert not alone.gave(load.prompt_of(i), i, found[i].answer[:-1])
            # A text that is likely whatever the seed may be anybody's.
            mistaken += alone.gave(load.prompt_of(i), i + 100, found[i].answer)
            mistaken += alone.gave(load.prompt_of(i + 7), i, found[i].answer)
        assert mistaken <= 2
        tally, wrong = load.Tally(), found[3].answer[:-1]
        tally.texts = {1: {found[1].answer: 2}, 2: {found[2].answer: 1, wrong: 3}}
        assert tally.compared(alone) == (0, 3)


def test_a_call_joins_while_another_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = Batches(monkeypatch)
    long = {"method": "best-of-n", "budget": 4, "n": 4, "max_tokens": 60}
    short = {"method": "best-of-n", "budget": 3, "n": 3, "max_tokens": 8}
    with sharing() as (aligner, pool):
        engine: Any = aligner.engine
        alone = texts(aligner.generate(PROMPTS[0], **long)), texts(aligner.generate(PROMPTS[1], **short))
        make_room(aligner, pool, long, short)
        runs, calls = batches.runs, list[Future[Result]]()

        def join() -> None:
            calls.append(pool.submit(aligner.generate, PROMPTS[1], **short))
            until_joined(engine, 1)()

        batches.steps.clear()
        first = aligner.generate(PROMPTS[0], on_progress=at_step(5, join), **long)
        assert batches.runs == runs + 1
        assert batches.steps[:13] == [4] * 5 + [7] * 8 and max(batches.steps[13:]) <= 4
        assert common(texts(first), alone[0]) > 0.6 and common(texts(calls[0].result()), alone[1]) > 0.6


def test_a_call_that_is_stopped_leaves_within_a_step_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = Batches(monkeypatch)
    asked = {"method": "best-of-n", "budget": 4, "n": 4, "max_tokens": 40}
    stopped = threading.Event()
    with sharing() as (aligner, pool):
        engine: Any = aligner.engine
        alone = texts(aligner.generate(PROMPTS[0], **asked))
        make_room(aligner, pool, asked, asked)
        batches.steps.clear()
        calls: list[Future[Result]] = []

        def progress(now: Progress) -> None:
            if now.step == 3:
                calls.append(pool.submit(aligner.generate, PROMPTS[1], stop=stopped.is_set, **asked))
                until_joined(engine, 1)()
            elif now.step == 20:
                stopped.set()

        assert common(texts(aligner.generate(PROMPTS[0], on_progress=progress, **asked)), alone) > 0.6
        other = calls[0].result()
        assert batches.steps[:20] == [4] * 3 + [8] * 17 and max(batches.steps[20:]) <= 4
        # As alone: what was cut short counts where there is nothing else.
        assert other.status == "interrupted" and [c.n_tokens for c in other.candidates] == [17] * 4


def test_deadlines_are_each_callers_own() -> None:
    with sharing() as (aligner, pool):
        aligner.generate(PROMPTS[0], budget=2, max_tokens=4)
        late = pool.submit(aligner.generate, PROMPTS[0], method="best-of-n", budget=512, n=4, time_limit=0.3)
        full = pool.submit(aligner.generate, PROMPTS[1], method="best-of-n", budget=8, n=4, max_tokens=40)
        assert full.result().status == "complete" and late.result().status == "time-limit"


def test_a_large_call_is_not_starved_by_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no room for it beside the first: those that come after it wait until it has had its turn."""
    small = {"method": "best-of-n", "budget": 2, "n": 2, "max_tokens": 8}
    order: list[str] = []
    with sharing(together=3) as (aligner, pool):
        engine: Any = aligner.engine

        def ask(name: str, progress: Any = None, **asked: Any) -> Result:
            def begun(now: Progress) -> None:
                if now.step == 0 and now.stats is None:
                    order.append(name)
                if progress is not None:
                    progress(now)

            return aligner.generate(PROMPTS[0], on_progress=begun, **asked)

        calls: list[Future[Result]] = []

        def crowd() -> None:
            calls.append(pool.submit(ask, "large", method="best-of-n", budget=40, n=40, max_tokens=40))
            until_joined(engine, 1)()
            for i in range(4):
                calls.append(pool.submit(ask, f"small {i}", **small))
                until_joined(engine, 2 + i)()

        ask("first", progress=at_step(2, crowd), **small)
        assert all(call.result().status == "complete" for call in calls)
    assert order[:2] == ["first", "large"] and sorted(order[2:]) == [f"small {i}" for i in range(4)]


def test_the_context_grows_to_what_is_asked_together_and_no_further() -> None:
    asked = {"method": "best-of-n", "budget": 4, "n": 4, "max_tokens": 100}
    with sharing(together=2) as (aligner, pool):
        engine: Any = aligner.engine
        for n, cells in ((4, 1024), (8, 1792), (2, 1792), (8, 1792)):  # 100 tokens of each row, for two calls
            make_room(aligner, pool, *[asked | {"budget": n, "n": n}] * 5)
            assert engine.settings["n_ctx"] == cells


def test_where_memory_lacks_calls_take_turns() -> None:
    asked = {"method": "best-of-n", "budget": 4, "n": 4, "max_tokens": 100}
    one = LlamaEngine(shipped.model())
    each = one.model.kv_bytes_per_token
    one.close()
    with sharing(memory_limit=600 * each) as (aligner, pool):
        engine: Any = aligner.engine
        found = pool.map(lambda prompt: aligner.generate(prompt, **asked), PROMPTS)
        assert all(result.status == "complete" for result in found) and engine.settings["n_ctx"] == 512
        with pytest.raises(CapacityError, match="would fit"):
            aligner.generate(PROMPTS[0], method="best-of-n", budget=8, n=8, max_tokens=100)
        assert aligner.generate(PROMPTS[0], **asked).status == "complete"


def test_prompts_that_are_kept_make_room_for_rows() -> None:
    """The cache is as full as can be: what former calls left there is forgotten, and nothing overflows."""
    long = ["Once upon a time there was a fox. " * 20 + animal for animal in ANIMALS]
    with sharing(together=2) as (aligner, pool):
        engine: Any = aligner.engine
        make_room(aligner, pool, *[{"method": "best-of-n", "budget": 2, "n": 2, "max_tokens": 400}] * 2)
        list(pool.map(lambda prompt: aligner.generate(prompt, method="best-of-n", budget=2, n=2, max_tokens=8), long))
        cells = engine.settings["n_ctx"]
        engine.model.eog[:] = False  # so that all are as long as they may be
        rows = (cells - 2 * 10) // 2 // 30
        asked = {"method": "best-of-n", "budget": rows, "n": rows, "max_tokens": 30}
        found = pool.map(lambda prompt: aligner.generate(prompt, **asked), [*PROMPTS, *PROMPTS])
        assert all(result.status == "complete" for result in found)


def test_what_fails_in_one_call_fails_there_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    reward = Background()
    reward.broken = {PROMPTS[1]}

    def raising(now: Progress) -> None:
        if now.step == 4:
            raise KeyboardInterrupt

    with sharing(reward=reward) as (aligner, pool):
        asked: dict[str, Any] = {"method": "best-of-n", "budget": 8, "n": 4, "max_tokens": 20}
        alone = texts(aligner.generate(PROMPTS[0], **asked))
        good, broken, interrupted, refused = (
            pool.submit(aligner.generate, PROMPTS[0], **asked),
            pool.submit(aligner.generate, PROMPTS[1], **asked),
            pool.submit(aligner.generate, PROMPTS[2], on_progress=raising, **asked),
            pool.submit(aligner.generate, "word " * 5000, **asked),
        )
        assert common(texts(good.result()), alone) > 0.6
        for call, kind, message in (
            (broken, Exception, "broken"),
            (interrupted, KeyboardInterrupt, None),
            (refused, CapacityError, "shorten it"),
        ):
            with pytest.raises(kind, match=message):
                call.result()
        assert texts(aligner.generate(PROMPTS[0], **asked)) == alone


def test_logits_that_are_not_finite_end_their_own_call() -> None:
    """Between two calls in one batch: the one that has them, and the other."""
    strong = np.full((2, 1, 1), 3e38, np.float32)
    with sharing() as (aligner, pool):
        engine: Any = aligner.engine
        alone = engine.rollout(PROMPTS[0], Controls(2, sampling=WARM), max_tokens=30, seeds=RowSeeds(1))
        controls = Controls(2, np.repeat(strong, engine.d, axis=2), held=True, sampling=WARM)
        calls = []

        def join(step: int, rows: int, n_tokens: int) -> None:
            if step == 4:
                calls.append(pool.submit(engine.rollout, PROMPTS[1], controls, max_tokens=8, seeds=RowSeeds(1)))
                until_joined(engine, 1)()

        make_room(aligner, pool, *[{"method": "best-of-n", "budget": 2, "n": 2, "max_tokens": 30}] * 2)
        asked: dict[str, Any] = {"max_tokens": 30, "seeds": RowSeeds(1), "on_step": join}
        found = engine.rollout(PROMPTS[0], Controls(2, sampling=WARM), **asked)
        with pytest.raises(DecodeError, match="not finite at step 1"):
            calls[0].result()
        assert found.texts == alone.texts


def test_when_llama_cpp_fails_all_fail_and_the_next_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {"method": "best-of-n", "budget": 4, "n": 4, "max_tokens": 40}
    failing = threading.Event()
    decode = Context.decode

    def fails(context: Context, *arguments: Any, **options: Any) -> None:
        if failing.is_set():
            failing.clear()
            raise DecodeError("llama.cpp failed to decode")
        decode(context, *arguments, **options)

    monkeypatch.setattr(Context, "decode", fails)
    with sharing() as (aligner, pool):
        engine: Any = aligner.engine
        make_room(aligner, pool, asked, asked)
        calls: list[Future[Result]] = []

        def join() -> None:
            calls.append(pool.submit(aligner.generate, PROMPTS[1], on_progress=at_step(3, failing.set), **asked))
            until_joined(engine, 1)()

        with pytest.raises(DecodeError):
            aligner.generate(PROMPTS[0], on_progress=at_step(2, join), **asked)
        with pytest.raises(DecodeError):
            calls[0].result()
        assert aligner.generate(PROMPTS[2], **asked).status == "complete"


def test_rewards_of_one_call_keep_no_other_waiting() -> None:
    """Neither while it decodes nor when it comes: one that waits for its rewards has no rows."""
    reward = Background()
    reward.go[PROMPTS[0]] = threading.Event()
    asked: dict[str, Any] = {"method": "best-of-n", "budget": 8, "n": 4, "max_tokens": 10}
    with sharing(reward=reward) as (aligner, pool):
        held = pool.submit(aligner.generate, PROMPTS[0], **asked)
        assert aligner.generate(PROMPTS[1], **asked).status == "complete"
        late = pool.submit(aligner.generate, PROMPTS[0], time_limit=0.2, **asked)
        assert aligner.generate(PROMPTS[2], **asked).status == "complete"
        time.sleep(0.3)
        assert not held.done() and not late.done()
        reward.go[PROMPTS[0]].set()
        assert held.result().status == "complete" and late.result().status == "time-limit"


@pytest.mark.usefixtures("no_gc_callbacks")
def test_ctrl_c_ends_the_call_that_waits_in_the_main_thread() -> None:
    asked: dict[str, Any] = {"method": "best-of-n", "n": 4, "max_tokens": 40}
    with sharing() as (aligner, pool):
        other = pool.submit(aligner.generate, PROMPTS[1], budget=40, **asked)

        def interrupt() -> None:
            os.kill(os.getpid(), signal.SIGINT)

        result = aligner.generate(PROMPTS[0], budget=400, on_progress=at_step_of(2, interrupt), **asked)
        assert result.status == "interrupted" and result.rollouts >= 4
        assert other.result().status == "complete"


def at_step_of(iteration: int, what: Callable[[], Any]) -> Callable[[Progress], None]:
    def progress(now: Progress) -> None:
        if now.iteration == iteration and now.step == 3:
            what()

    return progress


def test_an_engine_is_not_called_from_within_its_run_and_says_when_it_is_closed() -> None:
    asked: dict[str, Any] = {"method": "best-of-n", "budget": 4, "n": 4, "max_tokens": 30}
    with sharing(together=1) as (aligner, pool):
        engine: Any = aligner.engine
        inner: list[InputError] = []

        def call() -> None:
            with pytest.raises(InputError, match="from within its own run") as caught:
                aligner.generate(PROMPTS[1], **asked)
            inner.append(caught.value)

        aligner.generate(PROMPTS[0], on_progress=at_step(2, call), **asked)
        assert len(inner) == 1
        calls: list[Future[Result]] = []
        closing: list[threading.Thread] = []

        def close() -> None:
            calls.append(pool.submit(aligner.generate, PROMPTS[1], **asked))
            until_joined(engine, 1)()
            closing.append(threading.Thread(target=engine.close))
            closing[0].start()
            while not engine._closed:
                time.sleep(0.001)

        assert aligner.generate(PROMPTS[0], on_progress=at_step(2, close), **asked).status == "complete"
        with pytest.raises(InputError, match="closed"):
            calls[0].result()
        closing[0].join()
        with pytest.raises(InputError, match="closed"):
            aligner.generate(PROMPTS[0], **asked)
    with pytest.raises(InputError, match="together is 0"):
        SharedEngine(shipped.model(), together=0)


@pytest.mark.parametrize("kind", ["t5", "mamba", "gemma2"])
def test_models_of_other_kinds(kind: str, tmp_path: Path) -> None:
    """An encoder reads one prompt for all rows: its calls take turns. Others share theirs as any."""
    path = synthetic.write(tmp_path / f"{kind}.gguf", kind, vocab="bpe")
    asked: dict[str, Any] = {"method": "best-of-n", "budget": 4, "n": 2, "max_tokens": 6}
    with Aligner(LlamaEngine(path, threads=1), FakeReward(vowels)) as one:
        alone = [one.generate(prompt, **asked).rollouts for prompt in PROMPTS]
    with (
        Aligner(SharedEngine(path, threads=1, together=3), FakeReward(vowels)) as aligner,
        ThreadPoolExecutor(6) as pool,
    ):
        found = list(pool.map(lambda prompt: aligner.generate(prompt, **asked), PROMPTS))
    assert [result.rollouts for result in found] == alone
