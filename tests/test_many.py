"""Many prompts in one batch: each search is its own, turns are fair, and no clock has a say."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import synthetic

from aisp_local import Aligner, shipped
from aisp_local.controllers import METHODS, Aisp
from aisp_local.engine import Job, LlamaEngine
from aisp_local.errors import CapacityError, InputError, ScoreError
from aisp_local.loop import Task, search, search_many
from aisp_local.testing import FakeEngine, FakeReward, needed
from aisp_local.types import Controls, Progress, Prompt, Result, Rollouts

ANIMALS = ("fox", "bear", "little red hen", "dog that sang", "mouse")
PROMPTS = [f"Once upon a time there was a {animal}" for animal in ANIMALS]


def vowels(prompt: Prompt, responses: Sequence[str]) -> list[float]:
    return [float(sum(c in "aeiou" for c in r)) for r in responses]


def by_row(prompt: Prompt, responses: Sequence[str]) -> list[float]:
    """The same whatever the responses say, so that rounding cannot turn what a controller learns."""
    return [float((3 * i + len(str(prompt))) % 7) for i in range(len(responses))]


def key(result: Any) -> Any:
    assert isinstance(result, Result)
    return [(c.text, c.reward, c.iteration, c.row, c.n_tokens, c.logprob) for c in result.candidates]


class Recorder:
    """The real engine, with every job and what came of it written down, and when."""

    def __init__(self, engine: LlamaEngine) -> None:
        self._engine = engine
        self.jobs: list[Job] = []
        self.rollouts: dict[tuple[int, int], Rollouts] = {}  # by prompt index and iteration
        self.events: list[tuple[str, int, int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def run(self, feed: Any, **options: Any) -> None:
        real_next, real_finished = feed.next, feed.finished

        def next_(idle: bool) -> Job | None:
            job: Job | None = real_next(idle)
            if job is not None:
                self.jobs.append(job)
                self.events.append(("begun", job.seeds.prompt_index, job.seeds.iteration))
            return job

        def finished(job: Job, rollouts: Rollouts) -> None:
            where = job.seeds.prompt_index, job.seeds.iteration
            self.rollouts[where] = rollouts
            self.events.append(("ended", *where))
            real_finished(job, rollouts)

        feed.next, feed.finished = next_, finished
        self._engine.run(feed, **options)


def noise(jobs: Sequence[Job]) -> dict[tuple[int, int], tuple[Any, npt.NDArray[np.float32] | None]]:
    """What each prompt's iterations were decoded under."""
    return {(j.seeds.prompt_index, j.seeds.iteration): (j.seeds, j.controls.vectors) for j in jobs}


@pytest.mark.native
@pytest.mark.parametrize("method", sorted(METHODS))
def test_each_search_draws_what_it_would_draw_alone(method: str) -> None:
    """Noise, seeds and updates exactly; log-probabilities up to rounding, until it turns a token.

    An update from the laws or pre-logits of the rollouts is as exact as these, and one turned token makes the next
    another.
    """
    learns = method in ("misvo", "score")
    exact = 1 if learns else 3  # iterations
    rounding = 0.02 if learns else 0.0
    options: dict[str, Any] = {"method": method, "budget": 10, "n": 4, "max_tokens": 16, "seed": 3, "logprobs": True}
    shares = []
    with LlamaEngine(shipped.model(), threads=1, parallel=7) as engine:
        options |= needed(method, engine.d)
        many = Recorder(engine)
        together = Aligner(many, FakeReward(by_row)).generate_many(PROMPTS, **options)
        for i in (0, 2, 4):
            one = Recorder(engine)
            alone = Aligner(one, FakeReward(by_row)).generate(PROMPTS[i], prompt_index=i, **options)
            mine = together[i]
            assert isinstance(mine, Result)
            norms = [[s.control_norm or 0.0 for s in found.iterations] for found in (mine, alone)]
            np.testing.assert_allclose(norms[0][:exact], norms[1][:exact], rtol=rounding)
            expected, drawn = noise(one.jobs), noise([j for j in many.jobs if j.seeds.prompt_index == i])
            assert expected.keys() == drawn.keys() == {(i, 1), (i, 2), (i, 3)}
            for where, (seeds, vectors) in expected.items():
                assert drawn[where][0] == seeds
                if where[1] > exact:
                    continue
                np.testing.assert_array_equal(drawn[where][1], vectors)
                a, b = many.rollouts[where], one.rollouts[where]
                assert a.base_logprobs is not None and b.base_logprobs is not None
                for x, y, p, q in zip(a.tokens, b.tokens, a.base_logprobs, b.base_logprobs, strict=True):
                    n = min(len(x), len(y))
                    first = int(np.append(np.flatnonzero(x[:n] != y[:n]), n)[0])
                    np.testing.assert_allclose(p[:first], q[:first], atol=0.1)
                    shares.append(first / max(len(x), len(y)))
    assert np.mean(shares) > 0.8
    assert len({key(result)[0][0] for result in together}) == len(PROMPTS)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_the_others_do_not_matter(method: str) -> None:
    """Without rounding a search in a batch is to the bit what it is alone and beside others."""
    options: dict[str, Any] = {"method": method, "budget": 12, "n": 4, "max_tokens": 10, "seed": 1}
    if method in ("score", "smc"):
        options |= {"temperature": 3.0, "min_p": 0.0}  # min-p leaves this model's law one token
    aligner = Aligner(FakeEngine(), FakeReward(vowels))
    options |= needed(method, aligner.engine.d)
    together = aligner.generate_many(PROMPTS, **options)
    for i, prompt in enumerate(PROMPTS):
        assert key(together[i]) == key(aligner.generate(prompt, prompt_index=i, **options))
    assert [key(one) for one in aligner.generate_many(PROMPTS[:2], at_once=1, **options)] == list(
        map(key, together[:2])
    )
    assert len({str(key(one)) for one in together}) == len(PROMPTS)  # their numbers are their own


class Slow:
    """A reward in its own thread that takes its time, another time at every call."""

    name, background = "slow", True

    def __init__(self, seconds: float) -> None:
        self._seconds, self._rng = seconds, np.random.default_rng()

    def score(self, prompt: Prompt, responses: Sequence[str]) -> Any:
        time.sleep(self._seconds * self._rng.random())
        return vowels(prompt, responses)


@pytest.mark.native
def test_clocks_decide_nothing() -> None:
    """The same order of events and the same results to the bit, however long rewards and callbacks take."""
    rng = np.random.default_rng()

    def run(seconds: float) -> tuple[Any, Any]:
        def slowly(i: int, progress: Progress) -> None:
            if seconds and rng.random() < 0.1:
                time.sleep(0.005 * rng.random())

        with LlamaEngine(shipped.model(), threads=2, parallel=6) as engine:
            recorder = Recorder(engine)
            out = Aligner(recorder, Slow(seconds)).generate_many(
                PROMPTS[:4], method="aisp", budget=12, n=4, max_tokens=12, logprobs=True, on_progress=slowly
            )
        return recorder.events, list(map(key, out))

    assert run(0.0) == run(0.06)


@pytest.mark.native
def test_rewards_are_computed_while_rows_decode() -> None:
    """The first eight responses of an iteration do not wait for the others."""
    n, left, scoring = 24, [], threading.Event()

    class Told(Slow):
        def score(self, prompt: Prompt, responses: Sequence[str]) -> Any:
            scoring.set()
            return super().score(prompt, responses)

    def progress(report: Progress) -> None:
        if report.stats is None:
            # That a row ended is reported by the step's progress, and known to the scorer after it.
            if left and left[-1] <= n - 8 and report.rows_active:
                assert scoring.wait(10)
            left.append(report.rows_active)

    with Aligner(LlamaEngine(shipped.model(), threads=1), Told(0.0)) as aligner:
        aligner.generate(
            PROMPTS[0],
            method="best-of-n",
            budget=n,
            n=n,
            max_tokens=40,
            stop_strings=["."],
            temperature=1.0,
            on_progress=progress,
        )
    assert any(0 < rows <= n - 8 for rows in left[:-1]), left  # the steps that were waited in


def check_fair(events: Sequence[tuple[str, int, int]], prompts: int, iterations: int) -> None:
    """While a search waits for rows, no other one gets two turns."""
    waiting: dict[int, list[int]] = {i: [] for i in range(prompts)}  # who got a turn meanwhile
    for what, i, iteration in events:
        if what == "ended":
            if iteration < iterations:
                waiting[i] = []
            continue
        waiting.pop(i)
        for others in waiting.values():
            others.append(i)
            assert len(others) == len(set(others)), events


@pytest.mark.native
@pytest.mark.parametrize("parallel", [3, 5, 9])
def test_none_gets_two_turns_while_another_waits(parallel: int) -> None:
    """Fewer rows than rollouts that want one, and responses of different lengths."""
    with LlamaEngine(shipped.model(), threads=1, parallel=parallel) as engine:
        recorder = Recorder(engine)
        Aligner(recorder, FakeReward(vowels)).generate_many(
            PROMPTS, method="best-of-n", budget=9, n=3, max_tokens=40, stop_strings=["."], temperature=1.0
        )
    assert len({len(rollouts.tokens[0]) for rollouts in recorder.rollouts.values()}) > 3
    assert [event[1] for event in recorder.events if event[0] == "begun"][:5] == [0, 1, 2, 3, 4]
    check_fair(recorder.events, len(PROMPTS), 3)


@pytest.mark.native
@pytest.mark.parametrize("at_once", [None, 2])
def test_searches_keep_pace(at_once: int | None, tmp_path: Path) -> None:
    """Responses of one length: iterations differ by one at most, among those that share the rows."""
    path = synthetic.write_llama(tmp_path / "llama.gguf", vocab="bpe")
    done = dict.fromkeys(range(4), 0)
    running: set[int] = set()
    with LlamaEngine(path, threads=1, parallel=5) as engine:
        engine.model.eog[:] = False  # so that all are as long as they may be

        def progress(i: int, report: Progress) -> None:
            if report.stats is not None:
                done[i] = report.iteration
            elif report.step == 0:
                running.add(i)
            if done[i] == 4:
                running.discard(i)
            assert len(running) <= (at_once or 4)
            if at_once is None:
                assert max(done.values()) - min(done.values()) <= 1
            else:
                assert max(done[j] for j in running | {i}) - min(done[j] for j in running | {i}) <= 4

        out = Aligner(engine, FakeReward(vowels)).generate_many(
            PROMPTS[:4], budget=12, n=3, max_tokens=6, at_once=at_once, on_progress=progress
        )
    assert all(isinstance(one, Result) and one.status == "complete" and one.rollouts == 12 for one in out)


@pytest.mark.native
def test_a_prompt_that_cannot_be_used_leaves_the_others_alone() -> None:
    def picky(prompt: Prompt, responses: Sequence[str]) -> list[float]:
        if "bear" in str(prompt):
            raise RuntimeError("no bears")
        return vowels(prompt, responses)

    prompts: list[Prompt] = [PROMPTS[0], "", "word " * 3000, PROMPTS[1], [{"role": "user", "content": "Hello"}], []]
    options: dict[str, Any] = {"method": "best-of-n", "budget": 6, "n": 3, "max_tokens": 8, "baseline": True}
    with Aligner(LlamaEngine(shipped.model(), threads=1), FakeReward(picky)) as aligner:
        fox, empty, long, bear, chat, nothing = aligner.generate_many(prompts, **options)
        for result in (fox, chat):
            assert isinstance(result, Result) and result.rollouts == 6 and result.status == "complete"
            assert result.baseline is not None and result.reward_model == "picky" and result.versions
        for i, (error, kind, message) in enumerate(
            (
                (empty, InputError, "the prompt is empty"),
                (long, CapacityError, r"the prompt has \d+ tokens and the model's context \d+; shorten"),
                (bear, ScoreError, "no bears"),
                (nothing, InputError, "the conversation is empty"),
            )
        ):
            assert isinstance(error, kind)
            with pytest.raises(kind, match=message):
                raise error
            with pytest.raises(kind, match=message):
                aligner.generate(prompts[(1, 2, 3, 5)[i]], **options)
        (alone,) = aligner.generate_many([""], **options)
        assert isinstance(alone, InputError)


@pytest.mark.native
@pytest.mark.parametrize(
    ("mebibytes", "count", "advice"),
    [
        (3, 4, r"n = (\d+) for each of 4 prompts would fit"),
        (2.7, 5, r"n = 1 and (\d+) of 5 prompts at once \(at_once\) would fit"),
        (2, 1, r"n = (\d+) would fit"),
        (0.5, 5, "not even one does: use fewer prompts or tokens"),
    ],
)
def test_too_little_memory_for_many_prompts_says_what_fits(mebibytes: float, count: int, advice: str) -> None:
    """The number works when it is tried, also on a context of other sizes, and one more does not."""
    prompts = ["Once upon a time " * 60 + f" {i}" for i in range(count)]
    n = 8 if count > 1 else 32
    options: dict[str, Any] = {"method": "best-of-n", "n": n, "budget": n, "max_tokens": 64}
    engine = LlamaEngine(shipped.model(), threads=1, memory_limit=int(mebibytes * 2**20))
    with Aligner(engine, FakeReward(vowels)) as aligner:
        aligner.generate("Once", method="best-of-n", n=40, budget=40, max_tokens=2)
        with pytest.raises(CapacityError, match=advice) as caught:
            aligner.generate_many(prompts, **options)
        assert str(caught.value).startswith(f"{n * count} rollouts of 64 tokens")
        found = re.search(advice, str(caught.value))
        assert found is not None
        if not found.groups():
            return
        number = int(found[1])
        assert number >= 1

        def tried(number: int) -> dict[str, Any]:
            return options | ({"n": 1, "at_once": number} if "at_once" in advice else {"n": number, "budget": number})

        assert all(isinstance(one, Result) for one in aligner.generate_many(prompts, **tried(number)))
        with pytest.raises(CapacityError):
            aligner.generate_many(prompts, **tried(number + 1))


@pytest.mark.native
def test_prompts_in_turn_take_the_memory_of_one() -> None:
    prompts = ["Once upon a time " * 20 + f" {i}" for i in range(40)]
    options: dict[str, Any] = {"method": "best-of-n", "n": 2, "budget": 2, "max_tokens": 8}
    engine = LlamaEngine(shipped.model(), threads=1, memory_limit=2 * 2**20)
    with Aligner(engine, FakeReward(vowels)) as aligner:
        in_turn = aligner.generate_many(prompts, at_once=1, **options)
        assert all(isinstance(one, Result) for one in in_turn) and engine.settings["n_ctx"] <= 512
        with pytest.raises(CapacityError, match="at once"):
            aligner.generate_many(prompts, **options)
        alone = aligner.generate(prompts[7], prompt_index=7, **options)
        assert isinstance(in_turn[7], Result) and in_turn[7].answer == alone.answer


class Failing(Aisp):
    """Raises in one of its calls, in the second iteration."""

    def __init__(self, where: str, **options: Any) -> None:
        super().__init__(sigma=0.3, **options)
        self.where, self.asked, self.told = where, 0, 0

    def ask(self, n: int) -> Controls:
        self.asked += 1
        if self.where == "ask" and self.asked == 2:
            raise LookupError("ask")
        return super().ask(n)

    def tell(self, rollouts: Rollouts, rewards: Any) -> Any:
        self.told += 1
        if self.where == "tell" and self.told == 2:
            raise LookupError("tell")
        return super().tell(rollouts, rewards)


@pytest.mark.native
@pytest.mark.parametrize("where", ["ask", "tell", "begin", "step", "stats"])
@pytest.mark.parametrize("real", [False, True])
def test_a_controller_or_a_callback_that_raises_ends_its_own_search(where: str, real: bool) -> None:
    raised: list[Progress] = []
    late: list[Progress] = []

    def progress(i: int, report: Progress) -> None:
        if i == 1 and raised:
            late.append(report)
        at = "stats" if report.stats is not None else {0: "begin", 2: "step"}.get(report.step, "")
        if (i, at, report.iteration) == (1, where, 2):
            raised.append(report)
            raise LookupError(where)

    options: dict[str, Any] = {"method": "aisp", "budget": 9, "n": 3, "max_tokens": 10, "seed": 0}
    engine: Any = LlamaEngine(shipped.model(), threads=1, parallel=5) if real else FakeEngine()
    try:
        tasks = [
            Task(prompt, Failing(where if i == 1 else "", d=engine.d, max_tokens=10, seed=0, prompt_index=i), i)
            for i, prompt in enumerate(PROMPTS[:3])
        ]
        fox, bear, hen = search_many(engine, tasks, FakeReward(vowels), on_progress=progress, **options)
        assert isinstance(bear, LookupError) and str(bear) == where
        for one in (fox, hen):
            assert isinstance(one, Result) and one.status == "complete" and one.rollouts == 9
        raised.clear()
        alone = Failing(where, d=engine.d, max_tokens=10, seed=0, prompt_index=1)
        with pytest.raises(LookupError, match=where):
            search(engine, alone, FakeReward(vowels), "p", on_progress=lambda report: progress(1, report), **options)
        assert not late
    finally:
        if real:
            engine.close()


@pytest.mark.native
def test_a_search_that_failed_alone_decodes_no_more() -> None:
    asked: list[int] = []

    def progress(report: Progress) -> None:
        if report.step == 3:
            raise LookupError("third")

    options: dict[str, Any] = {"budget": 4, "n": 4, "max_tokens": 100, "on_progress": progress}
    aligner = Aligner(LlamaEngine(shipped.model(), threads=1), FakeReward(vowels))
    with aligner, pytest.raises(LookupError, match="third"):
        aligner.generate(PROMPTS[0], stop=lambda: bool(asked.append(1)), **options)
    assert len(asked) == 4


def test_what_is_no_list_of_prompts() -> None:
    aligner = Aligner(FakeEngine(), FakeReward(vowels))
    conversation: Any = [{"role": "user", "content": "Hello"}]
    for prompts in ("Hello", conversation):
        with pytest.raises(InputError, match="that is one prompt; give a list"):
            aligner.generate_many(prompts)
    with pytest.raises(InputError, match="at_once is 0 prompts"):
        aligner.generate_many(["Hello"], at_once=0)
    with pytest.raises(InputError, match="the prompt index is -1"):
        aligner.generate("Hello", prompt_index=-1, budget=1)
    assert aligner.generate_many([]) == []


def test_an_interrupt_leaves_the_answers_that_are_there() -> None:
    """One search at a time: the third has none yet."""
    aligner = Aligner(FakeEngine(), FakeReward(vowels))

    def progress(i: int, report: Progress) -> None:
        if i == 1 and report.iteration == 3:
            raise KeyboardInterrupt

    out = aligner.generate_many(PROMPTS[:3], budget=12, n=3, max_tokens=5, at_once=1, on_progress=progress)
    found = [one.status if isinstance(one, Result) else type(one) for one in out]
    assert found == ["complete", "interrupted", KeyboardInterrupt]
    stopped = aligner.generate_many(PROMPTS[:2], budget=12, n=3, max_tokens=5, stop=lambda: True)
    assert [type(one) for one in stopped] == [KeyboardInterrupt] * 2


def test_numbers_that_are_none() -> None:
    aligner = Aligner(FakeEngine(), FakeReward(lambda prompt, texts: [0.0] * len(texts)))
    for name, value in {"n": 1.5, "budget": True, "max_tokens": "9", "seed": 0.0}.items():
        with pytest.raises(InputError, match=f"{name} is {value!r}; it must be a whole number"):
            aligner.generate("x", **{"budget": 3, name: value})  # type: ignore[arg-type]
