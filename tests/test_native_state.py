"""Controls beside everything else that a context holds: other contexts, adapters, saved states, and misuse."""

from __future__ import annotations

import ctypes
import gc
import mmap
import resource
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp as C
import numpy as np
import pytest
import synthetic
from gguf import GGUFWriter
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from oracle import Head
from raw import Array, Raw, Schedule, Trace, follow

pytestmark = pytest.mark.native

N, STEPS = 4, 6
TOLERANCE = 2e-5  # of F32 logits of size 1


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.write_models(tmp_path_factory.mktemp("models"), ["llama-f32"])["llama-f32"]


@pytest.fixture
def raw(path: Path) -> Iterator[Raw]:
    with Raw(path, n_seq=N) as raw:
        yield raw


def schedule_of(raw: Raw, **options: Any) -> Schedule:
    return Schedule.make(raw.size, n=N, steps=STEPS, **options)


def noise(raw: Raw, seed: int = 1) -> Array:
    return np.random.default_rng(seed).standard_normal((N, STEPS, raw.d), np.float32)


def steer(raw: Raw, v: Array) -> None:
    assert raw.init_control(v.shape[1]) == 0
    for row in range(len(v)):
        assert raw.set_control(row, v[row], p0=schedule_of(raw).p0) == 0


def close(logits: Array, expected: Array, tolerance: float = TOLERANCE) -> bool:
    decoded = ~np.isnan(logits[..., 0])
    return float(np.abs(logits[decoded] - expected[decoded]).max()) <= tolerance


# Rows


@pytest.mark.parametrize("name", ["llama-f32", "llama-q8_0", "llama-q4_k", "gemma2-softcap", "qwen3moe", "falcon-h1"])
def test_what_other_rows_decode_changes_not_one_bit(name: str, tmp_path: Path) -> None:
    with Raw(synthetic.write_architecture(tmp_path, name), n_seq=N) as raw:
        schedule = schedule_of(raw)
        steer(raw, noise(raw))
        tokens = schedule.tokens.copy()
        before = follow(raw, schedule)
        tokens[[0, 1, 3]] = (tokens[[0, 1, 3]] + 17) % raw.size
        after = follow(raw, replace(schedule, tokens=tokens))
    assert after.logits[2].tobytes() == before.logits[2].tobytes()
    assert not after.same(before)


@pytest.mark.parametrize(
    ("name", "tolerance"), [("llama-f32", 1e-2), ("llama-q8_0", 0.1), ("llama-q4_k", 0.2), ("falcon-h1", 1e-2)]
)
def test_a_row_alone_is_the_row_in_a_batch(name: str, tolerance: float, tmp_path: Path) -> None:
    """Up to rounding (docs/architectures.md gives what was measured): sums are taken in another order."""
    with Raw(synthetic.write_architecture(tmp_path, name), n_seq=N) as raw:
        schedule = schedule_of(raw)
        v = noise(raw)
        steer(raw, v)
        together = follow(raw, schedule)
        length = int(schedule.lengths[0])
        alone = follow(raw, replace(schedule, tokens=schedule.tokens[:1], orders=[np.array([0])] * length))
    np.testing.assert_allclose(alone.logits[0, :length], together.logits[0, :length], rtol=0, atol=tolerance)


@pytest.mark.parametrize("unified", [True, False])
def test_sequences_longer_than_a_sliding_window(unified: bool, tmp_path: Path) -> None:
    """gemma2's window holds 32 tokens; the prompt alone has 70."""
    path = synthetic.write_architecture(tmp_path, "gemma2-softcap")
    with Raw(path, n_seq=N, unified=unified) as raw:
        schedule = schedule_of(raw, prompt=70)
        base = follow(raw, schedule, z=1)
        assert base.z is not None
        v = noise(raw)
        assert raw.init_control(STEPS) == 0
        for row in range(N):
            raw.set_control(row, v[row], p0=schedule.p0)
        moved = follow(raw, schedule)
    decoded = ~np.isnan(moved.logits[..., 0])
    np.testing.assert_allclose(moved.logits[decoded], Head(path)((base.z + v)[decoded]), rtol=0, atol=TOLERANCE)


# Other contexts, adapters, saved states


def test_two_contexts_of_one_model_have_their_own_controls(raw: Raw) -> None:
    schedule, v = schedule_of(raw), noise(raw)
    base = follow(raw, schedule)
    with Raw(raw, n_seq=N) as other:
        steer(raw, v)
        moved = follow(raw, schedule)
        assert follow(other, schedule).same(base)
        steer(other, -v)
        opposite = follow(other, schedule)
        assert not opposite.same(base) and not opposite.same(moved)
        assert follow(raw, schedule).same(moved)
        raw.clear_control()
        assert follow(other, schedule).same(opposite)
    assert follow(raw, schedule).same(base)


def write_lora(path: Path, raw: Raw, rank: int = 4) -> tuple[Array, Array]:
    """An adapter of the output matrix alone; its A [rank, d] and B [V, rank]."""
    rng = np.random.default_rng(5)
    a = rng.standard_normal((rank, raw.d), np.float32) / np.float32(raw.d**0.5)
    b = rng.standard_normal((raw.size, rank), np.float32)
    writer = GGUFWriter(str(path), "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(rank))
    writer.add_tensor("output.weight.lora_a", a)
    writer.add_tensor("output.weight.lora_b", b)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return a, b


def test_a_lora_of_the_output_matrix_sees_the_controlled_prelogits(raw: Raw, path: Path, tmp_path: Path) -> None:
    a, b = write_lora(tmp_path / "lora.gguf", raw)
    adapter = C.llama_adapter_lora_init(raw.model, str(tmp_path / "lora.gguf").encode())
    assert adapter
    schedule, v, head = schedule_of(raw), noise(raw), Head(path)
    base = follow(raw, schedule, z=1)
    assert base.z is not None
    adapters, scales = (C.llama_adapter_lora_p_ctypes * 1)(adapter), (ctypes.c_float * 1)(0.7)
    assert C.llama_set_adapters_lora(raw.ctx, adapters, 1, scales) == 0

    def expected(x: Array) -> Array:
        return head(x) + 0.7 * (x.astype(np.float64) @ a.T @ b.T)

    assert close(follow(raw, schedule).logits, expected(base.z))
    steer(raw, v)
    moved = follow(raw, schedule)
    assert close(moved.logits, expected(base.z + v))
    assert not close(moved.logits, expected(base.z) + head(base.z + v) - head(base.z), 0.1)
    assert C.llama_set_adapters_lora(raw.ctx, None, 0, None) == 0
    assert close(follow(raw, schedule).logits, head(base.z + v))


def test_control_vectors_of_the_layers_and_ours_add_up(raw: Raw, path: Path) -> None:
    schedule, v, head = schedule_of(raw), noise(raw), Head(path)
    plain = follow(raw, schedule, z=1)
    layers = int(C.llama_model_n_layer(raw.model))
    direction = np.random.default_rng(6).standard_normal((layers, raw.d)).astype(np.float32)
    data = direction.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    assert C.llama_set_adapter_cvec(raw.ctx, data, direction.size, raw.d, 1, layers) == 0
    base = follow(raw, schedule, z=1)
    assert base.z is not None and not base.same(plain)
    steer(raw, v)
    moved = follow(raw, schedule, z=1)
    assert moved.z is not None and moved.z.tobytes() == base.z.tobytes()
    assert close(moved.logits, head(base.z + v))
    assert C.llama_set_adapter_cvec(raw.ctx, None, 0, raw.d, 0, 0) == 0
    assert plain.z is not None
    assert close(follow(raw, schedule).logits, head(plain.z + v))
    raw.clear_control()
    assert follow(raw, schedule).same(plain)


def step(raw: Raw) -> Array:
    """Logits of one more token of sequence 1 after the prompt."""
    raw.decode([9], [3], [1])
    return raw.logits(0)


def prefill(raw: Raw) -> None:
    raw.reset()
    raw.decode([5, 6, 7], [0, 1, 2], [0, 0, 0], [0, 0, 0])
    raw.fork([1])


def saved(raw: Raw) -> Any:
    size = C.llama_state_get_size(raw.ctx)
    buffer = (ctypes.c_uint8 * size)()
    assert C.llama_state_get_data(raw.ctx, buffer, size) > 0
    return buffer


def test_a_saved_state_holds_no_controls_and_restoring_leaves_them_alone(raw: Raw) -> None:
    v = noise(raw)[0]
    prefill(raw)
    before = saved(raw)
    base = step(raw)
    assert raw.init_control(STEPS) == 0
    raw.set_control(1, v, p0=3)
    prefill(raw)
    state = saved(raw)
    assert bytes(state) == bytes(before)
    moved = step(raw)
    with Raw(raw, n_seq=N) as other:
        assert C.llama_state_set_data(other.ctx, state, len(state)) > 0
        assert step(other).tobytes() == base.tobytes()
    assert C.llama_state_set_data(raw.ctx, state, len(state)) > 0
    assert step(raw).tobytes() == moved.tobytes()


# What is read back


def test_prelogits_take_precedence_over_embeddings(raw: Raw) -> None:
    schedule, v = schedule_of(raw), noise(raw)
    base = follow(raw, schedule, z=1)
    steer(raw, v)
    C.llama_set_embeddings(raw.ctx, True)
    moved = follow(raw, schedule, z=2)
    C.llama_set_embeddings(raw.ctx, False)
    assert base.z is not None and moved.z is not None
    assert np.array_equal(moved.z, base.z + v, equal_nan=True)


@pytest.mark.parametrize("kind", [-1, 3, 2**31 - 1])
def test_an_unknown_kind_of_prelogits_is_refused(raw: Raw, kind: int) -> None:
    assert raw.want_prelogits(1) == 0
    assert raw.want_prelogits(kind) == -1
    raw.decode([5], [0], [0])
    assert raw.prelogits(0) is not None  # what was set before still holds


def test_prelogits_need_unpooled_outputs(path: Path) -> None:
    with Raw(path, n_seq=N, pooling=C.LLAMA_POOLING_TYPE_MEAN) as raw:
        assert raw.want_prelogits(1) == -1
        assert raw.want_prelogits(0) == 0


@pytest.mark.parametrize("width", [64, 256])
def test_prelogits_of_a_model_whose_embeddings_have_another_width(width: int, tmp_path: Path) -> None:
    settings = synthetic.whole(synthetic.ARCHITECTURES["lfm2"]) | {"embedding_length_out": width}
    path = synthetic.write(tmp_path / "lfm2.gguf", "lfm2", settings)
    with Raw(path, n_seq=N) as raw:
        assert raw.d != width == C.llama_model_n_embd_out(raw.model)
        assert raw.want_prelogits(1) == 0
        raw.decode([5, 6, 7, 8], [0] * N, range(N))
        z = np.array([raw.prelogits(i) for i in range(N)])
        logits = np.array([raw.logits(i) for i in range(N)])
        np.testing.assert_allclose(logits, Head(path)(z), rtol=0, atol=TOLERANCE)
        assert raw.want_prelogits(0) == 0  # what was decoded stays as it was
        np.testing.assert_array_equal([raw.prelogits(i) for i in range(N)], z)


# Misuse


def test_no_context_and_no_model_are_errors() -> None:
    vectors = (ctypes.c_float * 8)()
    assert C.llama_init_control(None, 4) == -1
    assert C.llama_set_control(None, 0, vectors, 1, 8, 0, False) == -1
    assert C.llama_set_prelogits(None, 1) == -1
    assert C.llama_model_get_output_rows(None, 0, 1, vectors) == -1
    C.llama_clear_control(None)


def test_more_steps_than_memory_is_an_error_and_changes_nothing(raw: Raw) -> None:
    schedule = schedule_of(raw)
    base = follow(raw, schedule)
    steer(raw, noise(raw))
    assert raw.init_control(2**31 - 1) == -1
    assert follow(raw, schedule).same(base)
    assert raw.set_control(0, noise(raw)[0]) == -1
    steer(raw, noise(raw))
    assert not follow(raw, schedule).same(base)


@pytest.mark.parametrize("p0", [-(2**31), -1, 2**31 - 1])
def test_positions_that_no_token_has_do_no_harm(raw: Raw, p0: int) -> None:
    schedule = schedule_of(raw)
    base = follow(raw, schedule)
    assert raw.init_control(STEPS) == 0
    assert raw.set_control(0, noise(raw)[0], p0=p0) == 0
    assert follow(raw, schedule).same(base)


def test_not_a_number_stays_in_its_row(raw: Raw) -> None:
    schedule = schedule_of(raw)
    base = follow(raw, schedule)
    assert raw.init_control(1) == 0
    raw.set_control(1, np.full((1, raw.d), np.nan, np.float32), p0=schedule.p0)
    moved = follow(raw, schedule)
    assert np.isnan(moved.logits[1, 0]).all()
    others = [0, 2, 3]
    assert moved.logits[others].tobytes() == base.logits[others].tobytes()


@pytest.mark.parametrize("sequences", [[0, 1], [1, 0]])
def test_a_token_of_several_sequences_takes_the_control_of_the_lowest(
    sequences: list[int], raw: Raw, path: Path
) -> None:
    assert raw.init_control(1) == 0
    v = noise(raw)[:, :1]
    raw.set_control(0, v[0])
    raw.set_control(1, v[1])
    raw.want_prelogits(1)
    raw.decode_shared(5, sequences)
    z = raw.prelogits(0)
    assert z is not None
    np.testing.assert_allclose(raw.logits(0), Head(path)(z + v[0][0]), rtol=0, atol=TOLERANCE)


class Anything(RuleBasedStateMachine):
    """Allocate, set, clear, free and decode in every order: the logits are always those of what should be set."""

    path: Path

    def __init__(self) -> None:
        super().__init__()
        self.raw = Raw(self.path, n_seq=2, n_ctx=256)
        self.head = Head(self.path)
        self.steps = 0
        self.trajectories: dict[int, tuple[Array, int, bool]] = {}
        self.raw.want_prelogits(1)

    def teardown(self) -> None:
        self.raw.close()

    @rule(steps=st.integers(0, 4))
    def allocate(self, steps: int) -> None:
        assert self.raw.init_control(steps) == 0
        self.steps, self.trajectories = steps, {}

    @rule()
    def misallocate(self) -> None:
        assert self.raw.init_control(-1) == -1
        self.steps, self.trajectories = 0, {}

    @rule(
        sequence=st.integers(-1, 1),
        steps=st.integers(1, 5),
        p0=st.integers(-2, 4),
        hold=st.booleans(),
        seed=st.integers(0, 99),
    )
    def set(self, sequence: int, steps: int, p0: int, hold: bool, seed: int) -> None:
        v = np.random.default_rng(seed).standard_normal((steps, self.raw.d), np.float32)
        code = self.raw.set_control(sequence, v, p0=p0, hold=hold)
        assert code == (0 if steps <= self.steps else -1)
        if code == 0:
            self.trajectories[sequence] = (v, p0, hold)

    @precondition(lambda self: self.steps)
    @rule(sequence=st.integers(-1, 1))
    def forget(self, sequence: int) -> None:
        assert self.raw.set_control(sequence, None) == 0
        self.trajectories.pop(sequence, None)

    @rule()
    def clear(self) -> None:
        self.raw.clear_control()
        self.trajectories = {}

    def vector(self, sequence: int, position: int) -> Array:
        total = np.zeros(self.raw.d, np.float32)
        for key in (-1, sequence):
            v, p0, hold = self.trajectories.get(key, (total[None], 0, False))
            t = position - p0
            if key in self.trajectories and (0 <= t < len(v) or (hold and t >= len(v))):
                total = total + v[min(t, len(v) - 1)]
        return total

    @invariant()
    def logits_are_those_of_what_is_set(self) -> None:
        self.raw.reset()
        places = [(sequence, position) for position in range(5) for sequence in (1, 0)]
        self.raw.decode([7] * 10, [p for _, p in places], [s for s, _ in places])
        for i, (sequence, position) in enumerate(places):
            z = self.raw.prelogits(i)
            assert z is not None
            expected = self.head(z + self.vector(sequence, position))
            np.testing.assert_allclose(self.raw.logits(i), expected, rtol=0, atol=TOLERANCE)


def test_every_order_of_allocating_setting_clearing_and_freeing(path: Path) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    Anything.path = path
    run_state_machine_as_test(
        Anything,
        settings=settings(
            max_examples=30, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


# Memory


def resident() -> int:
    """Bytes of memory that the process holds now."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def one_life(path: Path) -> Trace:
    with Raw(path, n_seq=N) as raw:
        steer(raw, noise(raw))
        trace = follow(raw, schedule_of(raw), z=2)
        assert raw.init_control(2 * STEPS) == 0
        assert raw.init_control(0) == 0
    return trace


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_a_hundred_lives_leave_memory_flat(path: Path) -> None:
    """Open, allocate, run, free: what the first thirty need, the next seventy do with."""
    for _ in range(30):
        one_life(path)
    gc.collect()
    before = resident()
    for _ in range(70):
        one_life(path)
    gc.collect()
    assert resident() - before < 2 * 2**20


@pytest.mark.skipif(b"AMX_INT8 = 1" not in C.llama_print_system_info(), reason="needs a build and a processor with AMX")
def test_another_library_may_release_the_tiles_of_a_thread(tmp_path: Path) -> None:
    """As PyTorch's does: a tile configuration that was loaded once would be gone, and the next product would die."""
    code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(b"\xc4\xe2\x78\x49\xc0\xc3")  # tilerelease; ret
    release = ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(code)))
    with Raw(synthetic.write_llama(tmp_path / "q8.gguf", kind="Q8_0", vocab="bpe"), n_seq=1) as raw:
        found = []
        for _ in range(2):
            raw.reset()
            raw.decode([1, 2, 3], [0, 1, 2], [0, 0, 0])
            found.append(raw.logits(2))
            release()
        np.testing.assert_array_equal(*found)
