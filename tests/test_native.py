"""The native patch against an independent numpy oracle, on ctypes level, for every kind of output head."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic
from oracle import Head, Llama
from raw import Array, Raw, Schedule, Trace, follow

pytestmark = pytest.mark.native

N, STEPS = 4, 6


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return synthetic.write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(params=list(synthetic.MODELS))
def path(request: pytest.FixtureRequest, models: dict[str, Path]) -> Path:
    return models[request.param]


@pytest.fixture
def raw(models: dict[str, Path]) -> Iterator[Raw]:
    with Raw(models["llama-f32"]) as raw:
        assert raw.init_control(STEPS) == 0
        yield raw


def noise(raw: Raw, steps: int = STEPS, seed: int = 1) -> Array:
    """One trajectory a row, about as long as the pre-logits themselves."""
    return np.random.default_rng(seed).standard_normal((N, steps, raw.d), np.float32)


def steer(raw: Raw, schedule: Schedule, v: Array, *, hold: bool = False) -> None:
    for row in range(len(v)):
        assert raw.set_control(row, v[row], p0=schedule.p0, hold=hold) == 0


def error(head: Head, logits: Array, x: Array) -> float:
    """Largest |logits - head(x)| over the tokens that were decoded."""
    decoded = ~np.isnan(logits[..., 0])
    return float(np.abs(logits[decoded] - head(x[decoded])).max())


def bound(base_error: float, z: Array, v: Array) -> float:
    """Three times the base model's own error, scaled with the head's input: rounding of activations is relative."""
    ratio = np.sqrt(1 + np.mean(np.square(v, dtype=np.float64)) / np.nanmean(np.square(z, dtype=np.float64)))
    return float(3 * ratio * base_error + 1e-6)


LAYOUTS = [(512, True), (512, False), (2, True), (2, False)]


@pytest.mark.parametrize(("n_ubatch", "unified"), LAYOUTS)
def test_rows_under_their_own_controls_match_the_oracle(path: Path, n_ubatch: int, unified: bool) -> None:
    """W (z + v), soft-capped, for rows of different length that change places in the batch."""
    head = Head(path)
    with Raw(path, n_seq=N, n_ubatch=n_ubatch, unified=unified) as raw:
        schedule = Schedule.make(raw.size, n=N, steps=STEPS)
        base = follow(raw, schedule, z=1)
        assert base.z is not None
        base_error = error(head, base.logits, base.z)
        v = noise(raw)
        assert raw.init_control(STEPS) == 0
        steer(raw, schedule, v)
        moved = follow(raw, schedule, z=1)
        assert moved.z is not None
        assert moved.z.tobytes() == base.z.tobytes()  # the pre-logits are those before the control
        assert error(head, moved.logits, base.z + v) <= bound(base_error, base.z, v)
        # The control is large against that bound: an ignored or misplaced one could not pass.
        assert error(head, moved.logits, base.z) > 20 * bound(base_error, base.z, v)


def test_nothing_set_is_the_base_model_node_for_node_and_bit_for_bit(path: Path) -> None:
    with Raw(path, n_seq=N, count_nodes=True) as raw:
        schedule = Schedule.make(raw.size, n=N, steps=STEPS)
        base = follow(raw, schedule)
        assert min(base.nodes) > 20
        assert raw.init_control(STEPS) == 0
        allocated = follow(raw, schedule)
        steer(raw, schedule, noise(raw))
        moved = follow(raw, schedule)
        raw.clear_control()
        cleared = follow(raw, schedule)
        assert raw.init_control(0) == 0
        freed = follow(raw, schedule)
    assert not moved.same(base)
    assert sum(moved.nodes) > sum(base.nodes)
    for trace in (allocated, cleared, freed):
        assert trace.nodes == base.nodes
        assert trace.same(base)


def test_a_control_reaches_its_own_row_only(path: Path) -> None:
    with Raw(path, n_seq=N) as raw:
        schedule = Schedule.make(raw.size, n=N, steps=STEPS)
        base = follow(raw, schedule)
        assert raw.init_control(STEPS) == 0
        raw.set_control(2, noise(raw)[2], p0=schedule.p0)
        moved = follow(raw, schedule)
    others = [0, 1, 3]
    assert moved.logits[others].tobytes() == base.logits[others].tobytes()
    last = schedule.lengths[2]
    assert (moved.logits[2, :last] != base.logits[2, :last]).any(axis=-1).all()


def run(raw: Raw) -> Trace:
    return follow(raw, Schedule.make(raw.size, n=N, steps=STEPS))


def p0(raw: Raw) -> int:
    return Schedule.make(raw.size, n=N, steps=STEPS).p0


def test_a_held_vector_equals_a_trajectory_of_equal_vectors(raw: Raw) -> None:
    v = noise(raw, steps=1)
    for row in range(N):
        raw.set_control(row, v[row], p0=p0(raw), hold=True)
    held = run(raw)
    for row in range(N):
        raw.set_control(row, np.repeat(v[row], STEPS, axis=0), p0=p0(raw))
    assert run(raw).same(held)


def test_the_last_vector_of_a_trajectory_is_held(raw: Raw) -> None:
    v = noise(raw)[0]
    raw.set_control(0, v[:3], p0=p0(raw), hold=True)
    held = run(raw)
    raw.set_control(0, np.concatenate([v[:3], np.repeat(v[2:3], STEPS - 3, axis=0)]), p0=p0(raw))
    assert run(raw).same(held)


def test_before_and_after_the_window_the_base_model_answers(raw: Raw) -> None:
    base = run(raw)
    v = noise(raw)
    for row in range(N):
        raw.set_control(row, v[row, :2], p0=p0(raw) + 1)
    moved = run(raw)
    for row, length in enumerate(Schedule.make(raw.size, n=N, steps=STEPS).lengths):
        changed = (moved.logits[row, :length] != base.logits[row, :length]).any(axis=-1)
        assert changed.tolist() == [t in (1, 2) for t in range(length)]


def test_zero_vectors_are_the_base_model_bit_for_bit(path: Path) -> None:
    with Raw(path, n_seq=N) as raw:
        schedule = Schedule.make(raw.size, n=N, steps=STEPS)
        base = follow(raw, schedule)
        assert raw.init_control(STEPS) == 0
        steer(raw, schedule, np.zeros((N, STEPS, raw.d), np.float32))
        assert follow(raw, schedule).same(base)


@pytest.mark.parametrize("n_ubatch", [512, 2])
def test_the_shared_mean_adds_to_each_row(models: dict[str, Path], n_ubatch: int) -> None:
    path = models["llama-f32"]
    head = Head(path)
    with Raw(path, n_seq=N, n_ubatch=n_ubatch) as raw:
        schedule = Schedule.make(raw.size, n=N, steps=STEPS)
        base = follow(raw, schedule, z=1)
        assert base.z is not None
        assert raw.init_control(STEPS) == 0
        v = noise(raw)
        mean = noise(raw, seed=2)[0]
        steer(raw, schedule, v)
        raw.set_control(-1, mean, p0=schedule.p0)
        limit = bound(error(head, base.logits, base.z), base.z, v + mean)
        assert error(head, follow(raw, schedule).logits, base.z + v + mean) <= limit
        for row in range(N):
            raw.set_control(row, None)
        alone = follow(raw, schedule)
        assert error(head, alone.logits, base.z + mean) <= limit
        raw.set_control(-1, None)
        assert follow(raw, schedule).same(base)


def test_null_clears_one_row(raw: Raw) -> None:
    v = noise(raw)
    raw.set_control(1, v[1], p0=p0(raw))
    one = run(raw)
    raw.set_control(3, v[3], p0=p0(raw))
    assert not run(raw).same(one)
    assert raw.set_control(3, None) == 0
    assert run(raw).same(one)


def test_a_second_allocation_forgets_what_was_set(raw: Raw) -> None:
    base = run(raw)
    raw.set_control(0, noise(raw)[0], p0=p0(raw), hold=True)
    assert not run(raw).same(base)
    assert raw.init_control(2 * STEPS) == 0
    assert run(raw).same(base)
    assert raw.set_control(0, noise(raw, steps=2 * STEPS)[0]) == 0


@pytest.mark.parametrize(
    "arguments",
    [{"seq": N}, {"seq": -2}, {"n_steps": STEPS + 1}, {"n_steps": 0}, {"n_steps": -1}, {"d": 64}],
    ids=str,
)
def test_wrong_arguments_are_refused_and_change_nothing(raw: Raw, arguments: dict[str, int]) -> None:
    base = run(raw)
    v = np.ones((STEPS + 1, raw.d), np.float32)
    options: dict[str, Any] = {"seq": 0, "n_steps": STEPS} | arguments
    assert raw.set_control(options.pop("seq"), v, **options) == -1
    assert run(raw).same(base)


def test_nothing_can_be_set_before_allocation_or_after_freeing(models: dict[str, Path]) -> None:
    with Raw(models["llama-f32"]) as raw:
        v = np.ones((1, raw.d), np.float32)
        assert raw.set_control(0, v) == -1
        raw.clear_control()
        assert raw.init_control(-1) == -1
        assert raw.init_control(1) == 0
        assert raw.set_control(0, v) == 0
        assert raw.init_control(0) == 0
        assert raw.set_control(0, v) == -1


def test_prelogits_are_those_of_the_output_rows(raw: Raw) -> None:
    raw.want_prelogits(1)
    raw.decode([5, 6, 7], [0, 1, 2], [0, 0, 0], [0, 0, 1])
    z = raw.prelogits(2)
    assert z is not None and np.isfinite(z).all()
    assert raw.prelogits(0) is None and raw.prelogits(1) is None
    logits = raw.logits(2)
    raw.want_prelogits(0)
    raw.reset()
    raw.decode([5, 6, 7], [0, 1, 2], [0, 0, 0], [0, 0, 1])
    assert raw.logits(2).tobytes() == logits.tobytes()
    assert raw.prelogits(2) is None


def test_graphs_are_reused_as_without_control(models: dict[str, Path]) -> None:
    with Raw(models["llama-f32"]) as raw:
        schedule = Schedule.make(raw.size, n=N, steps=STEPS)
        # The rows stay, so that the graph could be the same at every step.
        schedule = Schedule(schedule.prompt, schedule.tokens, np.full(N, STEPS), [np.arange(N) for _ in range(STEPS)])
        base = follow(raw, schedule)
        assert base.reused >= STEPS - 2
        assert raw.init_control(STEPS) == 0
        steer(raw, schedule, noise(raw))
        assert follow(raw, schedule).reused == base.reused
        # Other vectors need no other graph, and are used all the same.
        first = follow(raw, schedule)
        steer(raw, schedule, noise(raw, seed=9))
        second = follow(raw, schedule)
        assert second.reused == base.reused
        assert not second.same(first)


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [("llama-f32", 1e-5), ("llama-tied-f32", 1e-5), ("llama-f16", 2e-2), ("llama-q8_0", 0.15), ("llama-q4_k", 0.5)],
)
def test_the_oracle_is_the_model(models: dict[str, Path], name: str, tolerance: float) -> None:
    """The whole transformer in numpy gives llama.cpp's logits; quantised products round the activations."""
    model = Llama(models[name])
    tokens = np.random.default_rng(3).integers(0, 256, 12)
    with Raw(models[name], exact=True) as raw:
        raw.decode(tokens, range(len(tokens)), [0] * len(tokens))
        for i, token in enumerate(tokens):
            expected = model.head(model.step(int(token)))
            assert np.abs(raw.logits(i) - expected).max() <= tolerance
            assert expected.std() > 0.5
