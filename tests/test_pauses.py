"""Rollouts that pause and are gone on with: by the engine, and by the controllers that select among them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import synthetic
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import CHAT

from aisp_local import controllers, shipped
from aisp_local.controllers.blocks import BLOCKS, Schedule, select, selection_kl, survivors
from aisp_local.controllers.weights import importance_weights, lambda_for_ess
from aisp_local.engine import LlamaEngine
from aisp_local.engine.base import Job
from aisp_local.engine.decode import Decoder
from aisp_local.errors import InputError
from aisp_local.seeds import RowSeeds
from aisp_local.testing import FakeEngine
from aisp_local.types import Controls, FinishReason, Prompt, Rollouts, Sampling, Want

D, STEPS = 8, 24
WARM = Sampling(0.8, min_p=0.05)
Tokens = np.ndarray
GoOn = Callable[[Rollouts], list[Tokens]]


@pytest.fixture(scope="module")
def engine() -> Iterator[LlamaEngine]:
    with LlamaEngine(shipped.model()) as made:
        yield made


class Paused:
    """A feed of one search in blocks: ``go_on`` says what the next block's rollouts begin with."""

    def __init__(
        self, n: int, pauses: Sequence[int], go_on: GoOn, *, prompt: Prompt, want: frozenset[Want], steps: int
    ) -> None:
        self.pauses, self.go_on, self.prompt, self.want, self.steps = [*pauses, None], go_on, prompt, want, steps
        self.n, self.prefixes = n, [np.zeros(0, np.int32)] * n
        self.blocks: list[Rollouts] = []
        self.paused: list[list[bool]] = []

    def next(self, idle: bool) -> Job | None:
        if not self.pauses or not self.prefixes or len(self.blocks) < len(self.paused):
            return None
        self.paused.append([False] * len(self.prefixes))
        prefixes = self.prefixes if self.blocks else None
        controls = Controls(len(self.prefixes), sampling=WARM, prefixes=prefixes, pause=self.pauses.pop(0))
        return Job(self.prompt, controls, self.steps, RowSeeds(3), want=self.want)

    def stop(self) -> bool:
        return False

    def stepped(self, job: Job, step: int, rows: int, n_tokens: int) -> None:
        pass

    def ended(self, job: Job, row: int, text: str, paused: bool) -> None:
        self.paused[-1][row] = paused

    def finished(self, job: Job, rollouts: Rollouts) -> None:
        assert self.paused[-1] == [reason == "paused" for reason in rollouts.finish_reasons]
        self.blocks.append(rollouts)
        self.prefixes = self.go_on(rollouts)


def themselves(rollouts: Rollouts) -> list[Tokens]:
    return [t for t, reason in zip(rollouts.tokens, rollouts.finish_reasons, strict=True) if reason == "paused"]


def in_blocks(
    engine: LlamaEngine,
    n: int,
    pauses: Sequence[int],
    go_on: GoOn = themselves,
    prompt: Prompt = CHAT,
    want: frozenset[Want] = frozenset(),
    steps: int = STEPS,
) -> list[Rollouts]:
    feed = Paused(n, pauses, go_on, prompt=prompt, want=want, steps=steps)
    engine.run(feed, prompts=[prompt], n=n, max_tokens=steps)
    return feed.blocks


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many sequences were read again, by call."""
    calls: list[int] = []
    real = Decoder._read

    def read(self: Decoder, parts: list[tuple[int, Tokens, int]]) -> None:
        calls.append(len(parts))
        real(self, parts)

    monkeypatch.setattr(Decoder, "_read", read)
    return calls


@pytest.mark.native
@pytest.mark.parametrize("want", [frozenset(), frozenset({"logprobs"})])
def test_a_pause_changes_nothing(engine: LlamaEngine, reads: list[int], want: frozenset[Want]) -> None:
    whole = engine.rollout(CHAT, Controls(5, sampling=WARM), max_tokens=STEPS, seeds=RowSeeds(3))
    blocks = in_blocks(engine, 5, [4, 9, 20], want=want)
    assert [block.finish_reasons for block in blocks] == [["paused"] * 5] * 3 + [["length"] * 5]
    assert blocks[-1].texts == whole.texts
    assert not reads, "what a row holds is not read again"
    if not want:
        assert sum(block.n_tokens for block in blocks) == whole.n_tokens


@pytest.mark.native
@pytest.mark.parametrize("arch", ["gemma2", "mamba", "rwkv6", "t5", "jamba"])
def test_every_kind_of_memory_goes_on_from_any_rollout(tmp_path: Path, arch: str, reads: list[int]) -> None:
    """Also where rows change places, several go on from one, and one has no row to spare."""
    path = synthetic.write(tmp_path / f"{arch}.gguf", arch, vocab="bpe")

    def mixed(rollouts: Rollouts) -> list[Tokens]:
        """The order turned round, the middle one twice."""
        mine = themselves(rollouts)
        return [mine[i] for i in (2, 1, 1, 0)] if len(mine) == 4 else mine

    with LlamaEngine(path, threads=1) as small:
        blocks = in_blocks(small, 4, [3, 7], mixed, prompt="ab", steps=12)
    kept = len(reads)
    with LlamaEngine(path, threads=1) as small:
        for before, after in zip(blocks, blocks[1:], strict=False):
            controls = Controls(len(after), sampling=WARM, prefixes=mixed(before), pause=len(after.tokens[0]))
            # The same, with prefixes that are read.
            again = small.rollout("ab", controls, max_tokens=12, seeds=RowSeeds(3))
            for x, y in zip(after.tokens, again.tokens, strict=True):
                np.testing.assert_array_equal(x, y)
    assert kept == 0 and reads


@pytest.mark.native
def test_rows_that_went_to_others_are_read_again(engine: LlamaEngine, reads: list[int]) -> None:
    """Three rows for seven rollouts: only the last three of a block are still held."""
    whole = engine.rollout(CHAT, Controls(7, sampling=WARM), max_tokens=STEPS, seeds=RowSeeds(3))
    with LlamaEngine(shipped.model(), parallel=3) as small:
        blocks = in_blocks(small, 7, [6, 15])
    for x, y in zip(blocks[-1].tokens, whole.tokens, strict=True):
        np.testing.assert_array_equal(x[:6], y[:6])
    assert [block.finish_reasons for block in blocks] == [["paused"] * 7] * 2 + [["length"] * 7]
    assert sum(reads) == 2 * 4


@pytest.mark.native
def test_what_is_held_belongs_to_its_prompt(engine: LlamaEngine, reads: list[int]) -> None:
    other: Prompt = [{"role": "user", "content": "Tell me about a boat."}]

    class Two(Paused):
        def finished(self, job: Job, rollouts: Rollouts) -> None:
            super().finished(job, rollouts)
            self.prompt = other

    feed = Two(3, [5], themselves, prompt=CHAT, want=frozenset(), steps=STEPS)
    engine.run(feed, prompts=[CHAT, other], n=3, max_tokens=STEPS)
    assert sum(reads) == 3
    prefixes = themselves(feed.blocks[0])
    again = engine.rollout(other, Controls(3, sampling=WARM, prefixes=prefixes), max_tokens=STEPS, seeds=RowSeeds(3))
    assert feed.blocks[1].texts == again.texts


def test_the_fake_pauses_too_and_no_pause_lies_behind() -> None:
    fake = FakeEngine(vocabulary=30)
    rollouts = fake.rollout("", Controls(3, sampling=WARM, pause=4), max_tokens=9, seeds=RowSeeds(0))
    for tokens, reason in zip(rollouts.tokens, rollouts.finish_reasons, strict=True):
        assert reason == ("paused" if len(tokens) == 4 and tokens[-1] else "stop")
    with pytest.raises(InputError, match="cannot pause at 2 tokens"):
        Controls(1, prefixes=[np.zeros(2, np.int32)], pause=2)


@settings(max_examples=60)
@given(st.integers(1, 600), st.lists(st.integers(1, 600), max_size=4))
def test_a_schedule_pauses_before_the_end(max_tokens: int, lengths: list[int]) -> None:
    schedule = Schedule(max_tokens)
    schedule.learn([min(length, max_tokens) for length in lengths])
    positions, at = [], schedule.pause(0)
    while at is not None:
        positions.append(at)
        at = schedule.pause(at)
    assert all(a < b for a, b in zip([0, *positions], [*positions, max_tokens], strict=True))
    within = sum(position < schedule.expected for position in positions)
    assert schedule.count() == within <= BLOCKS + 6
    if lengths and schedule.expected >= 64:
        assert within >= BLOCKS - 2


def test_fewer_blocks_are_longer() -> None:
    counts = [Schedule(256, blocks).count() for blocks in (1, 2, 4, 8, 16)]
    assert counts == sorted(counts) and counts[0] < counts[2] < counts[4]


@pytest.mark.parametrize(("n", "k"), [(2, 1), (16, 1), (16, 3), (32, 5), (64, 63), (255, 30)])
def test_nats_of_a_selection(n: int, k: int) -> None:
    """Best-of-n has ``log n - (n - 1) / n``; else the histogram of the quantiles of many selections."""
    if k == 1:
        assert selection_kl(n, k) == pytest.approx(np.log(n) - (n - 1) / n, abs=2e-3)
    best = np.sort(np.random.default_rng(0).random((20_000, n)), axis=1)[:, n - k :].ravel()
    p = np.histogram(best, bins=200, range=(0, 1))[0] / best.size
    found = float((p[p > 0] * np.log(p[p > 0] * 200)).sum())
    assert selection_kl(n, k) == pytest.approx(found, abs=0.02 + 0.02 * found)
    assert selection_kl(n, k) <= np.log(n / k) and selection_kl(n, n) == 0


@given(st.integers(1, 300), st.floats(0, 8))
@settings(max_examples=60)
def test_as_few_survive_as_the_nats_allow(n: int, nats: float) -> None:
    k = survivors(n, nats)
    assert 1 <= k <= n and selection_kl(n, k) <= nats
    assert k == 1 or selection_kl(n, k - 1) > nats


def test_the_best_survive_and_copies_only_to_fill_up() -> None:
    tokens = [np.array(row, np.int32) for row in ([1], [2], [2], [3], [4], [5])]
    scores = np.array([0.0, 3.0, 3.0, 2.0, np.nan, 1.0])
    assert select(scores, tokens, 1) == [1]
    assert select(scores, tokens, 3) == [1, 3, 5]
    assert select(scores, tokens, 6) == [1, 3, 5, 0, 2]
    assert select(np.ones(6), tokens, 2) == list(range(6)), "nothing to choose by"
    assert select(np.ones(6), tokens, 1) == [0]
    assert select(np.full(6, np.nan), tokens, 2) == list(range(6))


@pytest.mark.parametrize(
    ("first", "later"),
    [
        ([24] * 4, [24] * 8 + [68] * 8),
        ([2] * 16, [40] * 16),
        ([68] * 16, [68] * 16),
        ([24] * 16, [24] * 2 + [300] * 14),
    ],
)
@pytest.mark.parametrize("alike", [False, True])
def test_a_selection_keeps_within_its_nats(first: list[int], later: list[int], alike: bool) -> None:
    """However long responses are, and however many begin alike."""
    controller = controllers.create("score", d=D, max_tokens=320, seed=0, strength=0.4, selection=1.0)
    rng = np.random.default_rng(0)
    for lengths in (first, later):
        going = list(lengths)
        while going:
            asked = controller.ask(len(going))
            pause = asked.pause or 320
            ends = [min(length, pause) for length in going]
            reasons: list[FinishReason] = ["paused" if length > pause else "stop" for length in going]
            tokens = [np.full(end, 0 if alike else i % 3, np.int32) for i, end in enumerate(ends)]
            info = controller.tell(
                Rollouts(tokens, [""] * len(going), reasons, 0.0, 0), rng.standard_normal(len(going))
            )
            going = [length for length in going if length > pause]
        assert info.selection_kl <= 80 * 0.4**2 + 1e-9
        assert info.kl == info.selection_kl


def test_smc_resamples_by_what_a_block_added() -> None:
    """Weights against their formula; rollouts that have none of it go on with nothing."""
    controller = controllers.create("smc", d=D, max_tokens=40, seed=3, ess=0.5)
    asked = controller.ask(6)
    assert asked.pause is not None and asked.vectors is None
    tokens = [np.full(asked.pause, i, np.int32) for i in range(6)]
    scores = np.array([0.0, 1.0, 2.0, 3.0, np.nan, 1.5])
    first = Rollouts(tokens, [""] * 6, ["paused"] * 6, 0.0, 0)
    assert controller.tell(first, scores).ess is None
    again = controller.ask(6)
    assert again.prefixes is not None and again.pause is not None and again.pause > asked.pause
    chosen = [int(prefix[0]) for prefix in again.prefixes]
    lambda_ = lambda_for_ess(scores, 3.0)
    assert lambda_ is not None
    expected = 6 * importance_weights(scores, lambda_)
    counts = np.bincount(chosen, minlength=6)
    assert (np.abs(counts - expected) < 1 + 1e-9).all(), "systematic resampling"
    # What a parent had already does not count again: nothing was added, all go on.
    second = [np.concatenate([prefix, prefix]) for prefix in again.prefixes]
    paused = Rollouts(second, [""] * 6, ["paused"] * 6, 0.0, 0)
    controller.tell(paused, scores[chosen])
    third = controller.ask(6).prefixes
    assert third is not None and [int(prefix[0]) for prefix in third] == chosen
    finished = Rollouts([np.full(40, 1, np.int32)] * 6, [""] * 6, ["length"] * 6, 0.0, 0)
    info = controller.tell(finished, scores)
    assert info.ess is not None and 1 <= info.ess <= 6 and controller.ask(6).prefixes is None


def test_smc_without_unfinished_scores_is_best_of_n() -> None:
    controller = controllers.create("smc", d=D, max_tokens=40, seed=3, unfinished=False)
    assert controller.ask(6).pause is None
    for bad in ({"ess": 0.0}, {"ess": 1.5}, {"temperature": 0.0}):
        with pytest.raises(InputError, match=next(iter(bad))):
            controllers.create("smc", d=D, max_tokens=4, seed=0, **bad)
