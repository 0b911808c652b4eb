"""Attention of sequences that share a cache, as the processor's kernel computes it, against exact arithmetic."""

from __future__ import annotations

from pathlib import Path

import llama_cpp
import numpy as np
import pytest
import synthetic
from raw import Array, Raw

pytestmark = pytest.mark.native

PROMPT, STEPS = 21, 6

# Grouped heads, soft caps, sinks, sliding windows, linear biases.
ARCHITECTURES = ("llama", "qwen2", "gemma2", "grok", "gpt-oss", "bloom", "mpt")


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("attention")
    return {name: synthetic.write(folder / f"{name}.gguf", name) for name in ARCHITECTURES}


def logits(raw: Raw, rows: int) -> Array:
    """[steps, rows, V] of rows that go on from one prompt, each with tokens of its own."""
    tokens = np.random.default_rng(0).integers(5, 300, (rows + 1, PROMPT))
    raw.decode(tokens[-1], range(PROMPT), [0] * PROMPT, [0] * PROMPT)
    for row in range(1, rows):
        llama_cpp.llama_memory_seq_cp(raw.memory, 0, row, -1, -1)
    found = []
    for t in range(STEPS):
        raw.decode(tokens[:rows, t], [PROMPT + t] * rows, range(rows))
        found.append([raw.logits(i) for i in range(rows)])
    return np.array(found)


@pytest.mark.parametrize("rows", [1, 5, 70])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_attend_to_their_own_cells(paths: dict[str, Path], architecture: str, rows: int) -> None:
    """One row, some, and more than a tile of them: exact but for keys and values in F16."""
    settings = {"n_seq": rows, "n_ctx": 4096}
    with Raw(paths[architecture], exact=True, **settings) as exact, Raw(paths[architecture], **settings) as raw:
        np.testing.assert_allclose(logits(raw, rows), logits(exact, rows), atol=0.02)


def test_other_sequences_leave_no_trace(paths: dict[str, Path]) -> None:
    """The same bits, whatever else lies in the cache."""
    tokens = np.random.default_rng(1).integers(5, 300, PROMPT)
    found = []
    for others in (0, 3, 7):
        with Raw(paths["llama"], n_seq=8, n_ctx=2048) as raw:
            for t in range(PROMPT):
                for other in range(others):
                    raw.decode([7 + other], [t], [1 + other])
                raw.decode(tokens[t : t + 1], [t], [0])
            found.append(raw.logits(0))
    np.testing.assert_array_equal(found[1], found[0])
    np.testing.assert_array_equal(found[2], found[0])
