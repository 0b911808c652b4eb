"""Whatever ends a run, the engine gives a clear error and its next answers are those of a new engine."""

from __future__ import annotations

import gc
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic

from aisp_local import Aligner, defaults
from aisp_local.engine import Job, LlamaEngine
from aisp_local.errors import CapacityError, DecodeError, InputError
from aisp_local.interrupts import InterruptsBetween, Uninterrupted
from aisp_local.native import Context
from aisp_local.native.graph import GraphControl
from aisp_local.rewards import Reward
from aisp_local.seeds import RowSeeds
from aisp_local.types import Controls, Prompt, Rollouts, Sampling

pytestmark = pytest.mark.native

ONE, TWO, THREE = "The cat sat.", "The cat sat on the red mat and ate the rat.", "A dog"
WARM = Sampling(0.8, top_p=0.9)
KINDS = ["llama", "gemma2", "mamba"]  # plain, with a window of 32 tokens, recurrent


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: synthetic.write(folder / f"{name}.gguf", name, vocab="bpe") for name in KINDS}


def controls(engine: LlamaEngine, n: int = 3) -> Controls:
    v = np.random.default_rng(0).standard_normal((n, 4, engine.d), np.float32)
    return Controls(n, v, sampling=WARM)


def roll(engine: LlamaEngine, prompt: str = ONE, n: int = 3, **options: Any) -> Rollouts:
    options = {"max_tokens": 8, "seeds": RowSeeds(3), "want": frozenset({"logprobs"})} | options
    chosen = options.pop("controls", None) or controls(engine, n)
    return engine.rollout(prompt, chosen, **options)


class Feed:
    """Gives all its jobs at once and keeps what comes of them."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs = list(jobs)
        self.out: list[Rollouts] = []

    def next(self, idle: bool) -> Job | None:
        return self.jobs.pop(0) if self.jobs else None

    def stop(self) -> bool:
        return False

    def stepped(self, job: Job, step: int, rows: int, n_tokens: int) -> None:
        pass

    def ended(self, job: Job, row: int, text: str, paused: bool) -> None:
        pass

    def finished(self, job: Job, rollouts: Rollouts) -> None:
        self.out.append(rollouts)


def run_two(engine: LlamaEngine) -> None:
    """Prompts that share a beginning, more rollouts than rows, with and without a control."""
    jobs = [
        Job(TWO, controls(engine), 6, RowSeeds(1)),
        Job(THREE, Controls(2, sampling=WARM), 6, RowSeeds(1, 1), want=frozenset({"logprobs"})),
        Job(ONE, Controls(2), 6, RowSeeds(1, 2)),
    ]
    engine.run(Feed(jobs), prompts=[TWO, THREE, ONE], n=4, max_tokens=8)


def key(out: Rollouts) -> list[tuple[bytes, bytes]]:
    """Tokens and log-probabilities, to the bit."""
    assert out.base_logprobs is not None
    return [(a.tobytes(), b.tobytes()) for a, b in zip(out.tokens, out.base_logprobs, strict=True)]


def answers(engine: LlamaEngine) -> Any:
    """To the bit: prompts are decoded anew, since where they lie in the cache decides how sums round."""
    found = []
    for prompt in (ONE, TWO):
        engine.forget()
        found.append(key(roll(engine, prompt)))
    return found


def kept_answers(engine: LlamaEngine) -> Any:
    """Tokens alone, of whatever the cache holds."""
    base = roll(engine, TWO + TWO, controls=Controls(4, sampling=WARM))
    return [[a.tobytes() for a in out.tokens] for out in (base, roll(engine, TWO), roll(engine, ONE))]


INTERRUPTED: list[tuple[type, str]] = [
    (Context, name) for name in ("decode", "fork", "remove", "want_prelogits", "clear_controls", "close")
]
INTERRUPTED += [(GraphControl, name) for name in ("_write", "_allocate")]


class Fault:
    """Breaks off the ``at``-th call of the context, before or after llama.cpp has done it."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.at, self.after, self.calls = -1, False, 0
        for owner, name in INTERRUPTED:
            patch.setattr(owner, name, self.wrapped(getattr(owner, name)))

    def wrapped(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(one: Any, *arguments: Any, **options: Any) -> Any:
            mine = self.calls == self.at
            self.calls += 1
            if mine and not self.after:
                raise KeyboardInterrupt
            result = real(one, *arguments, **options)
            if mine:
                raise KeyboardInterrupt
            return result

        return call

    def arm(self, at: int, after: bool) -> None:
        self.at, self.after, self.calls = at, after, 0


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupt_at_any_call_of_llama_cpp_leaves_no_trace(
    kind: str, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = Fault(monkeypatch)

    def engine() -> LlamaEngine:
        return LlamaEngine(models[kind], threads=1, flash_attention=False)

    with engine() as fresh:
        run_two(fresh)
        expected, kept = answers(fresh), kept_answers(fresh)
        fault.arm(-1, False)
        run_two(fresh)
        calls = fault.calls
    assert calls > 40
    for after in (False, True):
        with engine() as one:
            run_two(one)
            for at in [*range(10), *range(10, calls + 10, {"llama": 3, "gemma2": 7, "mamba": 17}[kind])]:
                roll(one, TWO + TWO)  # a long prompt whose place the others take
                fault.arm(at, after)
                try:
                    run_two(one)
                    assert at >= fault.calls
                except KeyboardInterrupt:
                    pass
                fault.arm(-1, False)
                assert kept_answers(one) == kept, (at, after)
                assert answers(one) == expected, (at, after)


@pytest.mark.usefixtures("no_gc_callbacks")
@pytest.mark.parametrize("control", ["graph", "callback"])
def test_ctrl_c_at_any_time(models: dict[str, Path], control: Any) -> None:
    """A real signal, at times that nobody chooses: while a context is made, a step decodes, a token is drawn."""
    rng, main, interrupted = np.random.default_rng(0), threading.main_thread().ident, 0
    assert main is not None
    with LlamaEngine(models["llama"], threads=1, control=control, flash_attention=False) as engine:
        run_two(engine)
        expected = answers(engine)
        for i in range(30):
            if i % 2:
                engine._drop_context()  # the next run makes one
            timer = threading.Timer(rng.uniform(0.0003, 0.02), lambda: signal.pthread_kill(main, signal.SIGINT))
            try:
                timer.start()
                run_two(engine)
                roll(engine, TWO + TWO, n=6)
                timer.join()
                time.sleep(0.1)
            except KeyboardInterrupt:
                interrupted += 1
            assert interrupted == i + 1
            engine._drop_context()
            run_two(engine)
            assert answers(engine) == expected
        model = engine.model
    assert model._contexts == 0 and not model._model


def test_an_interrupt_waits_for_the_end_of_a_call() -> None:
    done: list[str] = []

    def call(name: str) -> None:
        with Uninterrupted():
            signal.raise_signal(signal.SIGINT)
            done.append(name)

    with pytest.raises(KeyboardInterrupt):
        call("raises at the end")
    previous = signal.signal(signal.SIGINT, lambda *_: done.append("handled"))
    try:
        call("with a handler of the user's")
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        call("ignored")
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, previous)
    with ThreadPoolExecutor(1) as pool:  # where there are no handlers
        pool.submit(Uninterrupted().__enter__).result()
    assert done == ["raises at the end", "with a handler of the user's", "handled", "ignored"]
    assert signal.getsignal(signal.SIGINT) is previous


def test_between_calls_an_interrupt_comes_through() -> None:
    done: list[str] = []

    def interrupt() -> None:
        signal.raise_signal(signal.SIGINT)

    def handler(*_: object) -> None:
        done.append("handled")

    previous = signal.signal(signal.SIGINT, handler)
    try:
        with InterruptsBetween(), InterruptsBetween():
            with Uninterrupted():
                interrupt()
                with Uninterrupted():
                    interrupt()
                done.append("a call's end")
            interrupt()
            done.append("between")
        assert done == ["a call's end", *["handled"] * 3, "between"]
        assert signal.getsignal(signal.SIGINT) is handler
        with InterruptsBetween():
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # what was set meanwhile stays
        with InterruptsBetween(), Uninterrupted():
            interrupt()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with pytest.raises(KeyboardInterrupt), InterruptsBetween(), Uninterrupted():
            interrupt()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        with InterruptsBetween(), ThreadPoolExecutor(1) as pool:
            pool.submit(Uninterrupted().__enter__).result()
            with pytest.raises(KeyboardInterrupt):
                interrupt()
    finally:
        signal.signal(signal.SIGINT, previous)


def program(text: str, models: dict[str, Path]) -> subprocess.Popen[str]:
    """A process of its own, with ``path`` a model and this file as ``t``."""
    head = f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    head += f"import test_reliability as t\npath = {str(models['llama'])!r}\n"
    return subprocess.Popen(
        [sys.executable, "-c", head + text], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_sigint_while_decoding(models: dict[str, Path]) -> None:
    process = program(
        """
with t.LlamaEngine(path, threads=1) as engine:
    expected = t.answers(engine)
    try:
        while True:
            t.roll(engine, t.TWO, n=8, max_tokens=200, on_step=lambda step, *_: step == 5 and print("on", flush=True))
    except KeyboardInterrupt:
        print("interrupted")
    engine._drop_context()
    print(t.answers(engine) == expected)
""",
        models,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "on\n"
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=120)
    assert out.endswith("interrupted\nTrue\n"), error
    assert process.returncode == 0 and error == ""


def test_no_memory_for_a_context(models: dict[str, Path]) -> None:
    """llama.cpp itself cannot allocate: an error, and the engine goes on with what fits."""
    process = program(
        """
import resource
from aisp_local.errors import DecodeError
with t.LlamaEngine(path, threads=1, memory_limit=2**50) as engine:
    expected = t.answers(engine)
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 2**26, resource.RLIM_INFINITY))
    for n in (250, 200):
        try:
            t.roll(engine, t.TWO, n=n, max_tokens=256)
        except DecodeError as error:
            print(str(error).split(" (")[0])
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(t.answers(engine) == expected)
""",
        models,
    )
    out, error = process.communicate(timeout=120)
    lines = out.splitlines()
    assert len(lines) == 3 and lines[2] == "True", error
    assert all("llama.cpp could not make a context of" in line for line in lines[:2])


# The cache


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_is_decoded_once(kind: str, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the cache cannot be rolled back: iterations, another call, and a turn after it pay for what is new."""
    prefilled: list[tuple[int, int]] = []
    real = LlamaEngine._prefill

    def count(self: LlamaEngine, context: Any, sequence: int, tokens: Any, position: int) -> None:
        prefilled.append((position, len(tokens)))
        real(self, context, sequence, tokens, position)

    monkeypatch.setattr(LlamaEngine, "_prefill", count)
    with Aligner(LlamaEngine(models[kind], threads=1), Length()) as aligner:
        assert isinstance(aligner.engine, LlamaEngine)
        length, longer = (len(aligner.engine.tokens(text)) - 1 for text in (TWO, TWO + TWO))
        for prompt in (TWO, TWO, TWO + TWO, TWO + TWO):
            aligner.generate(prompt, budget=6, n=3, max_tokens=8, selection=0.0)
    once = [(0, length), *[(length, 0)] * 3]
    assert prefilled == [*once, (length, longer - length), *[(longer, 0)] * 3]


# Capacity


def test_more_prompt_than_a_feed_announced_fills_the_cache(models: dict[str, Path]) -> None:
    with LlamaEngine(models["llama"], threads=1, flash_attention=False) as engine:
        expected = answers(engine)
        with pytest.raises(DecodeError, match="the KV cache of 256 tokens is full"):
            engine.run(Feed([Job(TWO * 4, Controls(8), 30, RowSeeds(1))]), prompts=[ONE], n=8, max_tokens=30)
        assert answers(engine) == expected


def test_tokens_beyond_the_context_are_cut(models: dict[str, Path]) -> None:
    with LlamaEngine(models["llama"], threads=1) as engine:
        room = engine.room(ONE)
        out = roll(engine, max_tokens=10**9, controls=Controls(2, sampling=WARM))
        assert max(map(len, out.tokens)) <= room
        with pytest.raises(CapacityError, match="the model's context"):
            roll(engine, ONE * 40)


def test_no_memory_for_the_controls(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defaults, "MAX_ROWS", 10**12)
    monkeypatch.setattr(defaults, "MAX_BUDGET", 10**12)
    with Aligner(LlamaEngine(models["llama"], threads=1), Length()) as aligner:
        with pytest.raises(CapacityError, match="no memory for the controls of 1000000000000 rollouts"):
            aligner.generate(ONE, method="aisp", n=10**12, budget=10**12, max_tokens=8)
        assert aligner.generate(ONE, method="aisp", n=3, budget=3, max_tokens=10**12).rollouts == 3


# Callbacks and rewards


class Length:
    """A reward; ``background``: in a thread of its own."""

    name = "length"

    def __init__(self, background: bool = False, at: int = 0, do: Callable[[], Any] = lambda: None) -> None:
        self.background, self.calls, self.at, self.do = background, 0, at, do

    def score(self, prompt: Prompt, responses: Sequence[str]) -> Any:
        self.calls += 1
        if self.calls == self.at:
            self.do()
        return [float(len(text)) for text in responses]


def boom(*_: object) -> bool:
    raise RuntimeError("boom")


@pytest.mark.parametrize("background", [False, True])
def test_callbacks_that_raise(models: dict[str, Path], background: bool) -> None:
    engine = LlamaEngine(models["llama"], threads=1, flash_attention=False)
    options: dict[str, Any] = {"budget": 6, "n": 3, "max_tokens": 8}
    with engine:
        expected = answers(engine)

        def later(calls: int) -> Callable[..., bool]:
            left = [calls]

            def call(*_: object) -> bool:
                left[0] -= 1
                return boom() if left[0] < 0 else False

            return call

        for calls in (0, 1, 5, 12):
            reward: Reward = Length(background)
            for fails in (
                partial(roll, engine, on_step=later(calls % 8)),
                partial(roll, engine, should_stop=later(calls % 8)),
                partial(Aligner(engine, reward).generate, ONE, on_progress=later(calls), **options),
                partial(Aligner(engine, reward).generate, ONE, stop=later(calls), **options),
                partial(Aligner(engine, Length(background, 1 + calls % 2, boom)).generate, ONE, **options),
            ):
                with pytest.raises(Exception, match="boom"):
                    fails()
            assert answers(engine) == expected
    assert not any(thread.name.startswith("aisp-local-reward") for thread in threading.enumerate())


@pytest.mark.parametrize("background", [False, True])
def test_an_engine_called_from_within_its_own_run_says_so(models: dict[str, Path], background: bool) -> None:
    with LlamaEngine(models["llama"], threads=1) as engine, LlamaEngine(models["llama"], threads=1) as other:
        before = answers(engine)
        for inner in (partial(roll, engine), engine.forget, engine.close):
            with pytest.raises(InputError, match="within its own run"):
                roll(engine, on_step=lambda *_, inner=inner: inner())
            with pytest.raises(InputError, match="within its own run"):
                Aligner(engine, Length(background, 1, inner)).generate(ONE, budget=2, max_tokens=4)
        found: list[Any] = []
        roll(engine, should_stop=lambda: bool(found.append(roll(other))), max_tokens=3)
        assert found
        assert answers(engine) == before


# Threads


def test_two_engines_take_turns_and_run_at_once(models: dict[str, Path]) -> None:
    """Each in the middle of the other's run, then each in a thread of its own."""
    with LlamaEngine(models["llama"], threads=1) as one, LlamaEngine(models["gemma2"], threads=1) as two:
        expected = {engine: answers(engine) for engine in (one, two)}
        assert expected[one] != expected[two]
        inner: list[Any] = []
        one.forget()
        outer = roll(one, on_step=lambda *_: inner.append(answers(two)))
        assert key(outer) == expected[one][0] and inner and all(found == expected[two] for found in inner)
        with ThreadPoolExecutor(2) as pool:
            runs = {engine: [pool.submit(answers, engine) for _ in range(8)] for engine in (one, two)}
        for engine, found in runs.items():
            assert all(run.result() == expected[engine] for run in found)


def test_one_engine_serves_many_threads(models: dict[str, Path]) -> None:
    """Calls queue; rollouts of many lengths, so that contexts are made again, with tokens counted meanwhile."""
    prompts = (ONE, TWO, THREE, TWO + TWO)

    def ask(engine: LlamaEngine, i: int) -> tuple[list[bytes], int]:
        room = engine.room(prompts[i % 4])
        out = roll(engine, prompts[i % 4], n=1 + i % 5, max_tokens=4 + i % 7)
        return [row.tobytes() for row in out.tokens], room

    with LlamaEngine(models["llama"], threads=1, flash_attention=False) as engine:
        expected = [ask(engine, i) for i in range(30)]
    with LlamaEngine(models["llama"], threads=1, flash_attention=False) as engine, ThreadPoolExecutor(4) as pool:
        assert list(pool.map(partial(ask, engine), range(30))) == expected


def test_close_waits_for_a_run_and_nothing_goes_on_after_it(models: dict[str, Path]) -> None:
    engine = LlamaEngine(models["llama"], threads=1)
    expected = key(roll(engine))
    engine.forget()
    started, go = threading.Event(), threading.Event()

    def first_step(*_: object) -> None:
        started.set()
        go.wait(10)

    with ThreadPoolExecutor(3) as pool:
        running = pool.submit(roll, engine, on_step=first_step)
        assert started.wait(10)
        closing = pool.submit(engine.close)
        time.sleep(0.05)
        assert not closing.done()
        go.set()
        assert key(running.result(10)) == expected
        closing.result(10)
    engine.close()
    engine.forget()
    for use in (partial(roll, engine), partial(engine.room, ONE), partial(engine.tokens, ONE)):
        with pytest.raises(InputError, match="is closed"):
            use()
    assert engine.model._model is None


# Memory


def resident() -> int:
    """Bytes of memory that the process holds now."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_fifty_lives_of_an_engine_leave_memory_flat(models: dict[str, Path]) -> None:
    """Open, answer with ever other sizes, so that contexts are made again, with rewards in their thread, close."""

    def life(i: int) -> None:
        with Aligner(LlamaEngine(models["llama"], threads=1), Length(background=True)) as aligner:
            assert isinstance(aligner.engine, LlamaEngine)
            for n, prompt in ((2 + i % 3, ONE), (8, TWO * (1 + i % 4))):
                aligner.generate(prompt, budget=2 * n, n=n, max_tokens=6, kl=i % 2 == 0)
            with pytest.raises(RuntimeError, match="boom"):
                roll(aligner.engine, on_step=boom)

    for i in range(12):
        life(i)
    gc.collect()
    before, threads = resident(), threading.active_count()
    for i in range(50):
        life(i)
    gc.collect()
    assert resident() - before < 4 * 2**20
    assert threading.active_count() <= threads
