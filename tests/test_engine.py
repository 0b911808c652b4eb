"""The engine on the shipped model: forks, samples, stops, reports, refuses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic
from raw import Raw

from aisp_local import shipped
from aisp_local.engine import Job, LlamaEngine
from aisp_local.errors import CapacityError, InputError, ModelError
from aisp_local.seeds import RowSeeds
from aisp_local.types import Controls, Message, Rollouts, Sampling, Want

pytestmark = pytest.mark.native

CHAT: list[Message] = [{"role": "user", "content": "Tell me a story about a fox."}]
WARM = Sampling(0.8, top_p=0.9)


@pytest.fixture(scope="module")
def engine() -> Iterator[LlamaEngine]:
    with LlamaEngine(shipped.model()) as made:
        yield made


def roll(engine: LlamaEngine, controls: Controls, prompt: Any = CHAT, **options: Any) -> Rollouts:
    return engine.rollout(prompt, controls, **({"max_tokens": 24, "seeds": RowSeeds(7)} | options))


def same(a: Rollouts, b: Rollouts) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a.tokens, b.tokens, strict=True)) and a.texts == b.texts


def test_the_same_seeds_are_the_same_run_and_the_prompt_is_prefilled_once(engine: LlamaEngine) -> None:
    first = roll(engine, Controls(n=4, sampling=WARM))
    again = roll(engine, Controls(n=4, sampling=WARM))
    assert same(first, again)
    assert len(set(first.texts)) > 1
    assert not same(first, roll(engine, Controls(n=4, sampling=WARM), seeds=RowSeeds(8)))
    np.testing.assert_array_equal(engine._cache.tokens[0], engine.tokens(CHAT)[:-1])


def test_a_longer_conversation_reuses_the_prefix(engine: LlamaEngine) -> None:
    longer: list[Message] = [*CHAT, {"role": "assistant", "content": "Once."}, {"role": "user", "content": "More!"}]
    warm = roll(engine, Controls(n=2), prompt=longer)
    with LlamaEngine(shipped.model()) as fresh:
        assert same(warm, roll(fresh, Controls(n=2), prompt=longer))
    assert same(roll(engine, Controls(n=2)), roll(engine, Controls(n=2)))


def test_greedy_without_control_is_the_base_model_in_every_row(engine: LlamaEngine) -> None:
    rollouts = roll(engine, Controls(n=5))
    assert len(set(rollouts.texts)) == 1
    zero = Controls(n=5, vectors=np.zeros((5, 24, engine.d), np.float32))
    assert same(rollouts, roll(engine, zero))


def test_a_row_follows_its_own_control(engine: LlamaEngine) -> None:
    """A control is worth the same in another row, beside other rows, held or repeated."""
    v = np.random.default_rng(0).standard_normal((3, 24, engine.d)).astype(np.float32)
    rollouts = roll(engine, Controls(n=3, vectors=v))
    assert len(set(rollouts.texts)) == 3
    turned = roll(engine, Controls(n=3, vectors=v[::-1].copy()))
    assert list(turned.texts) == list(rollouts.texts)[::-1]
    held = roll(engine, Controls(n=3, vectors=v[:, :1], held=True))
    repeated = roll(engine, Controls(n=3, vectors=np.repeat(v[:, :1], 24, axis=1)))
    assert same(held, repeated)


def test_reports_agree_with_the_head(engine: LlamaEngine) -> None:
    """Log-probabilities and KL from the read-back pre-logits, recomputed here from the same head."""
    v = 0.5 * np.random.default_rng(1).standard_normal((3, 1, engine.d)).astype(np.float32)
    want: Any = frozenset({"kl", "logprobs", "prelogits"})
    out = roll(engine, Controls(n=3, vectors=v, held=True), want=want, max_tokens=10)
    assert out.prelogits is not None and out.base_logprobs is not None and out.kl is not None

    def log_softmax(x: np.ndarray) -> np.ndarray:
        x = x.astype(np.float64)
        x = x - x.max(axis=1, keepdims=True)
        return np.asarray(x - np.log(np.exp(x).sum(axis=1, keepdims=True)))

    for row in range(3):
        z = out.prelogits[row]
        q = log_softmax(engine.head.project(z))
        p = log_softmax(engine.head.project(z + v[row]))
        np.testing.assert_array_equal(p.argmax(axis=1), out.tokens[row])
        picked = q[np.arange(len(z)), out.tokens[row]]
        np.testing.assert_allclose(out.base_logprobs[row], picked, atol=0.02)
        np.testing.assert_allclose(out.kl[row], (np.exp(p) * (p - q)).sum(), rtol=0.05)
    for sampling in (Sampling(), Sampling(1.0)):
        base = roll(engine, Controls(n=2, sampling=sampling), want=want, max_tokens=10)
        assert base.kl is not None
        np.testing.assert_array_equal(base.kl, 0.0)


@pytest.mark.parametrize("size", [0.0, 0.5])
@pytest.mark.parametrize("sampling", [Sampling(0.6), Sampling(1.0, min_p=0.1), Sampling(1.4, top_p=0.9), Sampling(2.0)])
def test_nats_are_those_from_the_model_itself(engine: LlamaEngine, size: float, sampling: Sampling) -> None:
    """Temperature and truncation count, with a control and without one."""
    v = size * np.random.default_rng(1).standard_normal((3, 1, engine.d)).astype(np.float32)
    controls = Controls(n=3, vectors=v if size else None, held=bool(size), sampling=sampling)
    out = roll(engine, controls, want=frozenset({"kl", "prelogits"}), max_tokens=10)
    assert out.prelogits is not None and out.kl is not None
    for row in range(3):
        q = engine.head.project(out.prelogits[row]).astype(np.float64)
        x = engine.head.project(out.prelogits[row] + v[row]).astype(np.float64)
        x -= x.max(axis=1, keepdims=True)
        p = np.exp(x / sampling.temperature)
        for whole, law in zip(np.exp(x), p, strict=True):  # cut before the temperature
            law[whole < sampling.min_p] = 0
            order = np.argsort(-whole)
            law[order[(np.cumsum(whole[order]) - whole[order]) / whole.sum() >= sampling.top_p]] = 0
        p /= p.sum(axis=1, keepdims=True)
        q -= np.log(np.exp(q).sum(axis=1, keepdims=True))
        expected = float((p * (np.log(np.maximum(p, 1e-300)) - q)).sum())
        assert expected > 0.05
        assert out.kl[row] == pytest.approx(expected, rel=0.05)


def test_stops(engine: LlamaEngine) -> None:
    limited = roll(engine, Controls(n=2), max_tokens=5)
    assert limited.finish_reasons == ["length", "length"]
    assert [len(t) for t in limited.tokens] == [5, 5]
    full = roll(engine, Controls(n=3, sampling=Sampling(0.6)), max_tokens=400)
    assert full.n_tokens == sum(len(t) for t in full.tokens)
    for tokens, reason in zip(full.tokens, full.finish_reasons, strict=True):
        assert bool(engine.model.eog[tokens[-1]]) == (reason == "stop")
        assert not engine.model.eog[tokens[:-1]].any()
    stopped = roll(engine, Controls(n=2), stop_strings=["."], max_tokens=100)
    assert all(
        "." not in text and reason == "stop" for text, reason in zip(stopped.texts, stopped.finish_reasons, strict=True)
    )
    steps: list[int] = []
    cut = roll(
        engine,
        Controls(n=2),
        should_stop=lambda: len(steps) >= 3,
        on_step=lambda step, rows, tokens: steps.append(step),
    )
    assert steps == [1, 2, 3]
    assert cut.finish_reasons == ["interrupted", "interrupted"]
    assert same(limited, roll(engine, Controls(n=2), max_tokens=5))


def test_plain_text_is_continued(engine: LlamaEngine) -> None:
    rollouts = roll(engine, Controls(n=1), prompt="Once upon a")
    assert rollouts.texts[0]
    one_token = engine.model.tokenize("a", add_special=False, parse_special=False)
    assert len(one_token) == 1
    assert roll(engine, Controls(n=2), prompt="a").n_tokens > 0


def test_an_exception_leaves_the_engine_usable(engine: LlamaEngine) -> None:
    before = roll(engine, Controls(n=3, sampling=WARM))

    def explode(step: int, rows: int, tokens: int) -> None:
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        roll(engine, Controls(n=3, sampling=WARM), on_step=explode)
    assert same(before, roll(engine, Controls(n=3, sampling=WARM)))


@pytest.mark.parametrize(
    ("prompt", "controls", "options", "error", "message"),
    [
        ("word " * 3000, Controls(n=1), {}, CapacityError, "the model's context"),
        ("", Controls(n=1), {}, InputError, "prompt is empty"),
        ([], Controls(n=1), {}, InputError, "conversation is empty"),
        ([{"role": "user"}], Controls(n=1), {}, InputError, "message 1 is not of the form"),
        (CHAT, Controls(n=1), {"max_tokens": 0}, InputError, "max_tokens is 0"),
        (CHAT, Controls(n=1), {"stop_strings": [""]}, InputError, "stop string is empty"),
        (CHAT, Controls(n=1, vectors=np.zeros((1, 2, 5), np.float32)), {}, InputError, "5 wide"),
    ],
)
def test_what_cannot_be_done_is_said(
    engine: LlamaEngine, prompt: Any, controls: Controls, options: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        roll(engine, controls, prompt=prompt, **options)


def test_too_little_memory_says_what_fits() -> None:
    with LlamaEngine(shipped.model(), memory_limit=2 * 2**20) as small:
        with pytest.raises(
            CapacityError, match=r"100 rollouts of 24 tokens need \d+ MiB .* n = \d+ would fit"
        ) as error:
            roll(small, Controls(n=100))
        fits = int(str(error.value).split("n = ")[1].split()[0])
        assert fits >= 1
        roll(small, Controls(n=fits), max_tokens=24)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p, "does not exist"),
        (lambda p: (p.mkdir(), p)[1], "is a folder"),
        (lambda p: (p.write_bytes(b""), p)[1], "not a GGUF"),
        (lambda p: (p.write_bytes(b"PK" * 50), p)[1], "not a GGUF"),
        (lambda p: (p.write_bytes(shipped.model().read_bytes()[:10]), p)[1], "truncated"),
        (lambda p: (p.write_bytes(shipped.model().read_bytes()[:500_000]), p)[1], "cannot be loaded .* truncated"),
        (lambda p: (synthetic.write_vocab_only(p), p)[1], "vocabulary only"),
    ],
)
def test_files_that_are_no_models(tmp_path: Path, make: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        LlamaEngine(make(tmp_path / "model.gguf"))


def test_an_encoder_decoder_model_answers_as_llama_cpp_does_step_by_step(tmp_path: Path) -> None:
    path = synthetic.write(tmp_path / "t5.gguf", "t5", vocab="bpe")
    prompts = {text: text * 9 for text in ("One.", "Another, ")}  # longer than n_ubatch
    expected: dict[str, list[int]] = {}
    with LlamaEngine(path, threads=1, n_ubatch=16) as engine:
        for name, text in prompts.items():
            tokens = engine.tokens(text)
            assert len(tokens) > 16
            with Raw(path, n_seq=1) as raw:
                raw.encode(tokens, [0])
                expected[name] = [engine.model.decoder_start]
                for t in range(8):
                    raw.decode([expected[name][-1]], [t], [0])
                    expected[name].append(int(raw.logits(0).argmax()))
        for n in (1, 3, 2):  # rows may join, leave and share one encoding
            for name, text in prompts.items():
                done = engine.rollout(text, Controls(n), max_tokens=8, seeds=RowSeeds(1))
                assert {tuple(row.tolist()) for row in done.tokens} == {tuple(expected[name][1:])}
        moved = np.random.default_rng(0).standard_normal((2, 1, engine.d), np.float32)
        done = engine.rollout("One.", Controls(2, 3 * moved, held=True), max_tokens=8, seeds=RowSeeds(1))
        assert not np.array_equal(*done.tokens)


def test_a_model_that_does_not_write_from_left_to_right_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is a diffusion model"):
        LlamaEngine(synthetic.write(tmp_path / "dream.gguf", "dream", vocab="bpe"))


@pytest.mark.parametrize("first", ["model", "context"])
@pytest.mark.parametrize("control", ["graph", "callback"])
def test_model_and_context_are_freed_once_in_either_order(first: str, control: Any) -> None:
    engine = LlamaEngine(shipped.model(), control=control)
    roll(engine, Controls(1, np.zeros((1, 1, engine.d), np.float32), held=True))
    model, context = engine.model, engine._context
    assert context is not None
    if first == "model":
        model.close()
        assert model._model  # the context still needs it
        context.close()
    else:
        context.close()
        assert model._model
        model.close()
    assert not model._model
    engine.close()
    for part in (model, context):
        with pytest.raises(InputError, match="is closed"):
            part.pointer  # noqa: B018


class Jobs:
    """A feed that gives all its jobs at once."""

    def __init__(self, jobs: list[Job]) -> None:
        self.waiting, self.jobs = list(jobs), jobs
        self.out: dict[int, Rollouts] = {}
        self.order: list[tuple[int, int]] = []

    def next(self, idle: bool) -> Job | None:
        return self.waiting.pop(0) if self.waiting else None

    def stop(self) -> bool:
        return False

    def stepped(self, job: Job, step: int, rows: int, n_tokens: int) -> None:
        pass

    def ended(self, job: Job, row: int, text: str, paused: bool) -> None:
        self.order.append((self.jobs.index(job), row))

    def finished(self, job: Job, rollouts: Rollouts) -> None:
        self.out[self.jobs.index(job)] = rollouts


PROMPTS = [f"Once upon a time there was a {animal}" for animal in ("fox", "bear", "little red hen", "fox that sang")]


def jobs_of(engine: LlamaEngine, n: int = 5, tokens: int = 40) -> list[Job]:
    """Sampled, greedy under a trajectory, held, and the base model."""
    v = np.random.default_rng(3).standard_normal((n, tokens, engine.d)).astype(np.float32)
    controls = [
        Controls(n, v, sampling=WARM),
        Controls(n, v),
        Controls(n, v[:, :1], held=True, sampling=WARM),
        Controls(n, sampling=Sampling(1.0)),
    ]
    want: frozenset[Want] = frozenset({"logprobs"})
    pairs = zip(PROMPTS, controls, strict=True)
    return [Job(prompt, control, tokens, RowSeeds(5, i), want=want) for i, (prompt, control) in enumerate(pairs)]


def run_jobs(engine: LlamaEngine, jobs: list[Job]) -> Jobs:
    feed = Jobs(jobs)
    engine.run(feed, prompts=[job.prompt for job in jobs], n=sum(j.controls.n for j in jobs), max_tokens=40)
    return feed


def check_beginning(a: Rollouts, b: Rollouts) -> list[float]:
    """Log-probabilities agree up to the first different token; the share of each rollout's tokens that is before it."""
    shares = []
    assert a.base_logprobs is not None and b.base_logprobs is not None
    for x, y, p, q in zip(a.tokens, b.tokens, a.base_logprobs, b.base_logprobs, strict=True):
        n = min(len(x), len(y))
        differs = np.flatnonzero(x[:n] != y[:n])
        first = int(differs[0]) if len(differs) else n
        np.testing.assert_allclose(p[:first], q[:first], atol=0.05)
        shares.append(first / max(len(x), len(y)))
    return shares


def test_rows_take_the_next_rollout_of_whatever_prompt_waits() -> None:
    """A rollout is its own whatever rows it shares the batch with; the same schedule is the same to the bit."""
    with LlamaEngine(shipped.model(), threads=1) as engine:
        alone = [roll(engine, j.controls, j.prompt, seeds=j.seeds, max_tokens=40, want=j.want) for j in jobs_of(engine)]
    runs: dict[int, list[Jobs]] = {}
    for parallel in (20, 3, 3):
        with LlamaEngine(shipped.model(), threads=1, parallel=parallel) as engine:
            runs.setdefault(parallel, []).append(run_jobs(engine, jobs_of(engine)))
            assert engine._context is not None and engine._context.n_seq_max == parallel + 4
    for feed in (*runs[20], runs[3][0]):
        # Sums round differently beside other rows, which may turn a near tie: then the rest of a rollout differs.
        assert np.mean([check_beginning(one, feed.out[i]) for i, one in enumerate(alone)]) > 0.7
        assert all(out.n_tokens == sum(map(len, out.tokens)) for out in feed.out.values())
    first, again = runs[3]
    assert first.order == again.order
    assert all(same(first.out[i], again.out[i]) for i in range(4))
    assert {job for job, _ in first.order[:8]} == {0, 1}  # three rows: the later jobs wait


class Counted(Jobs):
    """Also the rows of each step, beside the rollouts that had not ended before it."""

    def __init__(self, jobs: list[Job]) -> None:
        super().__init__(jobs)
        self.steps: list[tuple[int, int]] = []
        self._left = sum(job.controls.n for job in jobs)
        self._decoded: dict[int, int] = {}

    def stop(self) -> bool:
        self.steps.append((0, self._left))
        return False

    def stepped(self, job: Job, step: int, rows: int, n_tokens: int) -> None:
        mine = n_tokens - self._decoded.get(id(job), 0)
        self._decoded[id(job)] = n_tokens
        self.steps[-1] = self.steps[-1][0] + mine, self.steps[-1][1]

    def ended(self, job: Job, row: int, text: str, paused: bool) -> None:
        super().ended(job, row, text, paused)
        self._left -= 1


@pytest.mark.parametrize(("prompts", "n"), [([0], 12), ([0, 1, 2, 3], 3), ([0, 0, 0], 4)])
def test_no_row_is_free_while_a_rollout_waits(prompts: list[int], n: int) -> None:
    """Of the same job, of another prompt's, and of another job with the same prompt, for which there is one place."""
    controls = Controls(n, sampling=Sampling(1.0))
    jobs = [Job(PROMPTS[p], controls, 40, RowSeeds(5, i), stop_strings=["."]) for i, p in enumerate(prompts)]
    feed = Counted(jobs)
    with LlamaEngine(shipped.model(), threads=1, parallel=5) as engine:
        engine.run(feed, prompts=[PROMPTS[p] for p in sorted(set(prompts))], n=12, max_tokens=40)
    assert [rows for rows, _ in feed.steps] == [min(5, left) for _, left in feed.steps]
    assert len({len(tokens) for out in feed.out.values() for tokens in out.tokens}) > 5


def test_more_rollouts_than_llama_cpp_has_sequences(engine: LlamaEngine) -> None:
    out = roll(engine, Controls(n=300, sampling=Sampling(1.0)), max_tokens=8)
    assert set(out.finish_reasons) <= {"length", "stop"} and len(out) == 300
    assert len(set(out.texts)) > 100


def test_prompts_share_what_they_begin_with(engine: LlamaEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    prefilled: list[tuple[int, int]] = []
    real = LlamaEngine._prefill

    def count(self: LlamaEngine, context: Any, sequence: int, tokens: Any, position: int) -> None:
        prefilled.append((position, len(tokens)))
        real(self, context, sequence, tokens, position)

    monkeypatch.setattr(LlamaEngine, "_prefill", count)
    system = "You write short stories for children. " * 4
    prompts = [system + "Write one of a fox.", system + "Write one of a bear."]
    lengths = [len(engine.tokens(p)) - 1 for p in prompts]
    with LlamaEngine(shipped.model(), threads=1) as fresh:
        jobs = [Job(p, Controls(2), 8, RowSeeds(1)) for p in prompts]
        run_jobs(fresh, jobs)
        (_, first), (start, second) = prefilled
        assert first == lengths[0]
        assert start > 10 and start + second == lengths[1]
        prefilled.clear()
        run_jobs(fresh, jobs[::-1])  # both are still there
        assert [n for _, n in prefilled] == [0, 0]
        prefilled.clear()
        roll(fresh, Controls(2), prompts[1] + " And a bird.")  # only what is new
        assert prefilled[0][0] > start
    for prompt in prompts:
        with LlamaEngine(shipped.model(), threads=1) as alone:
            assert same(roll(alone, Controls(2), prompt), roll(engine, Controls(2), prompt))
