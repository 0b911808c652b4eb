"""The patch itself, on the level of llama.h: what controls do, and that they do nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import synthetic
from raw import Raw

pytestmark = pytest.mark.native

ROWS, STEPS = 5, 4
RNG = np.random.default_rng(0)
V = RNG.standard_normal((ROWS, STEPS, synthetic.D)).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module", params=sorted(synthetic.MODELS))
def case(request: pytest.FixtureRequest, folder: Path) -> tuple[Path, synthetic.Model]:
    path = folder / f"{request.param}.gguf"
    model = synthetic.MODELS[request.param]
    if not path.exists():
        synthetic.write(path, model)
    return path, model


@pytest.fixture(scope="module")
def llama(folder: Path) -> Path:
    path = folder / "llama-f32.gguf"
    if not path.exists():
        synthetic.write(path, synthetic.MODELS["llama-f32"])
    return path


@pytest.fixture
def raw(llama: Path) -> Iterator[Raw]:
    with Raw(llama) as context:
        yield context


def rollouts(raw: Raw, ends: list[int]) -> tuple[dict[tuple[int, int], np.ndarray], dict[tuple[int, int], np.ndarray]]:
    """Logits and pre-logits by (row, step): a prompt of 3 tokens, then rows that end after ``ends`` steps."""
    raw.restart()
    raw.llama.llama_set_prelogits(raw.ctx, True)
    memory = raw.llama.llama_get_memory(raw.ctx)
    raw.decode([3, 1, 4], [0, 1, 2], [0, 0, 0], [False] * 3)
    n = len(ends)
    for row in range(n):
        raw.llama.llama_memory_seq_cp(memory, 0, row + 1, -1, -1)
    logits, prelogits = {}, {}
    for step in range(max(ends)):
        rows = [row for row in range(n) if ends[row] > step]
        rows = rows[step % 2 :] + rows[: step % 2]  # another order every other step
        x = raw.decode(
            [10 + 7 * step + row for row in rows], [3 + step] * len(rows), [r + 1 for r in rows], [True] * len(rows)
        )
        z = raw.prelogits()
        for i, row in enumerate(rows):
            logits[row, step], prelogits[row, step] = x[i], z[i]
    return logits, prelogits


@pytest.mark.parametrize("n_ubatch", [512, 2])
@pytest.mark.parametrize("unified", [True, False])
def test_each_row_gets_its_own_control(case: tuple[Path, synthetic.Model], n_ubatch: int, unified: bool) -> None:
    """Different controls a row, rows that end at different times: logits are W(z + v) of the oracle."""
    path, model = case
    head = synthetic.head(path, model)
    ends = [6, 2, 5, 1, 6]
    with Raw(path, n_ubatch=n_ubatch, unified=unified) as raw:
        base, z_base = rollouts(raw, ends)
        assert raw.init(STEPS) == 0
        for row in range(ROWS):
            assert raw.set(row + 1, V[row], position=3) == 0
        logits, z = rollouts(raw, ends)
        raw.llama.llama_clear_control(raw.ctx)
        cleared, _ = rollouts(raw, ends)
    base_error = max(np.abs(base[k] - head(z_base[k][None])[0]).max() for k in base)
    for row, step in logits:
        np.testing.assert_array_equal(z[row, step], z_base[row, step])
        np.testing.assert_array_equal(cleared[row, step], base[row, step])
        v = V[row, step] if step < STEPS else 0.0
        # The control widens the input by about sqrt(2), and so its quantisation.
        np.testing.assert_allclose(logits[row, step], head((z[row, step] + v)[None])[0], atol=3 * base_error + 1e-5)
        if step < STEPS:
            assert np.abs(logits[row, step] - base[row, step]).max() > 0.1
        else:
            np.testing.assert_array_equal(logits[row, step], base[row, step])


def test_without_a_control_the_graph_is_the_stock_one(case: tuple[Path, synthetic.Model]) -> None:
    path, _ = case
    batch = ([5, 6, 7], [0, 1, 2], [0, 0, 0], [False, False, True])

    def run(raw: Raw) -> tuple[np.ndarray, int]:
        raw.restart()
        logits = raw.decode(*batch)
        return logits, raw.nodes

    with Raw(path, count_nodes=True) as raw:
        base, nodes = run(raw)
        assert raw.init(STEPS) == 0
        allocated, nodes_allocated = run(raw)
        assert raw.set(0, V[0]) == 0
        _, nodes_set = run(raw)
        raw.llama.llama_clear_control(raw.ctx)
        cleared, nodes_cleared = run(raw)
        assert raw.init(0) == 0
        freed, nodes_freed = run(raw)
    assert nodes > 0
    assert nodes_allocated == nodes_cleared == nodes_freed == nodes
    assert nodes < nodes_set <= nodes + 3
    for logits in (allocated, cleared, freed):
        np.testing.assert_array_equal(logits, base)


def three_steps(raw: Raw) -> np.ndarray:
    """Logits [3, V] of one sequence's positions 0, 1, 2, decoded one by one."""
    raw.restart()
    return np.concatenate([raw.decode([9 + t], [t], [0], [True]) for t in range(3)])


def test_held_is_a_trajectory_of_equal_vectors(raw: Raw) -> None:
    raw.init(3)
    raw.set(0, V[0, :1], hold=True)
    held = three_steps(raw)
    raw.set(0, np.repeat(V[0, :1], 3, axis=0))
    np.testing.assert_array_equal(held, three_steps(raw))


def test_past_its_end_a_trajectory_has_no_effect_unless_held(raw: Raw) -> None:
    base = three_steps(raw)
    raw.init(3)
    raw.set(0, V[0, :2])
    logits = three_steps(raw)
    assert np.abs(logits[:2] - base[:2]).max(axis=1).min() > 0.1
    np.testing.assert_array_equal(logits[2], base[2])
    raw.set(0, V[0, :2], position=1)
    np.testing.assert_array_equal(three_steps(raw)[0], base[0])


def test_a_zero_vector_is_the_base_model(raw: Raw) -> None:
    base = three_steps(raw)
    raw.init(3)
    raw.set(0, np.zeros((3, raw.d), np.float32))
    np.testing.assert_array_equal(three_steps(raw), base)


def test_the_shared_mean_adds_to_every_row(raw: Raw) -> None:
    raw.init(3)
    raw.set(0, V[0, :3] + V[1, :3])
    expected = three_steps(raw)
    raw.set(0, V[0, :3])
    raw.set(-1, V[1, :3])
    np.testing.assert_allclose(three_steps(raw), expected, atol=1e-5)
    assert raw.set(-1, None) == 0
    only_own = three_steps(raw)
    raw.init(3)
    raw.set(0, V[0, :3])
    np.testing.assert_array_equal(only_own, three_steps(raw))


def test_null_clears_one_row(raw: Raw) -> None:
    base = three_steps(raw)
    raw.init(3)
    raw.set(0, V[0, :3])
    assert raw.set(0, None) == 0
    np.testing.assert_array_equal(three_steps(raw), base)


def test_misuse_is_an_error_code(raw: Raw) -> None:
    assert raw.set(0, V[0]) == -1  # nothing allocated
    assert raw.init(-1) == -1
    assert raw.init(2) == 0
    assert raw.set(0, V[0]) == -1  # four steps
    assert raw.set(0, V[0, :0]) == -1
    assert raw.set(0, V[0, :2, :-1]) == -1
    assert raw.set(8, V[0, :2]) == -1
    assert raw.set(-2, V[0, :2]) == -1
    assert raw.init(4) == 0  # again, larger
    assert raw.set(0, V[0]) == 0
    assert raw.init(0) == 0
    assert raw.set(0, V[0]) == -1


def test_prelogits_are_read_for_outputs_only(raw: Raw) -> None:
    raw.llama.llama_set_prelogits(raw.ctx, True)
    logits = raw.decode([1, 2, 3, 4], [0, 1, 2, 3], [0] * 4, [False, True, False, True])
    z = raw.prelogits()
    assert logits.shape[0] == z.shape[0] == 2
    assert not raw.llama.llama_get_embeddings_ith(raw.ctx, 0)
    assert raw.llama.llama_get_embeddings_ith(raw.ctx, 1)
    raw.llama.llama_set_prelogits(raw.ctx, False)
    raw.decode([5], [4], [0], [True])
    assert not raw.llama.llama_get_embeddings(raw.ctx)


def test_graphs_are_reused_under_control(raw: Raw) -> None:
    def reused(steps: int = 20) -> int:
        raw.restart()
        before = raw.reused()
        for t in range(steps):
            raw.decode([7 + t], [t], [0], [True])
        return raw.reused() - before

    without = reused()
    raw.init(30)
    raw.set(0, RNG.standard_normal((30, raw.d)))
    assert without > 0
    assert reused() == without
