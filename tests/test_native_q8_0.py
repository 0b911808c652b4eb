"""Products with Q8_0 matrices, whatever kernel the processor has for them, against exact arithmetic."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import synthetic
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader
from gguf.quants import dequantize, quantize
from raw import Raw

pytestmark = pytest.mark.native

BLOCK = 32


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.write_llama(tmp_path_factory.mktemp("q8") / "llama.gguf", kind="Q8_0")


def head_and_inputs(path: Path, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The output matrix [V, d], and pre-logits [rows, d] with their logits [rows, V], decoded in one batch."""
    (matrix,) = (tensor for tensor in GGUFReader(path).tensors if tensor.name == "output.weight")
    with Raw(path, n_seq=rows) as raw:
        assert raw.want_prelogits(1) == 0
        raw.decode(np.arange(rows) + 1, [0] * rows, range(rows))
        z = [raw.prelogits(i) for i in range(rows)]
        assert not any(each is None for each in z)
        logits = np.stack([raw.logits(i) for i in range(rows)])
    return dequantize(matrix.data, Type.Q8_0).astype(np.float64), np.array(z), logits


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 11, 33])
def test_a_product_is_exact_but_for_the_rounding_of_its_input(path: Path, rows: int) -> None:
    """One row, groups of four and what is left of them: integer products in each block, float32 sums of blocks."""
    weight, z, logits = head_and_inputs(path, rows)
    rounded = dequantize(quantize(z, Type.Q8_0), Type.Q8_0).astype(np.float64)
    expected = rounded @ weight.T
    size = np.abs(rounded) @ np.abs(weight.T)
    error = np.abs(logits - expected)
    # Where a value lies between two steps of its block, either may be taken.
    step = np.abs(z).reshape(rows, -1, BLOCK).max(axis=2).max(axis=1)[:, None] / 127
    either = error > 1e-5 * size
    assert either.any(axis=1).mean() < 0.2
    assert (error <= 1e-5 * size + 2 * step * np.abs(weight).max(axis=1)).all()


def test_a_row_has_the_same_bits_in_every_batch(path: Path) -> None:
    """The product itself: equal inputs give equal logits, whatever stands beside them."""
    z, logits = {}, {}
    for rows in (1, 3, 4, 6, 16):
        _, z[rows], logits[rows] = head_and_inputs(path, rows)
    compared = 0
    for rows in (3, 4, 6, 16):
        for i in range(rows):
            if np.array_equal(z[16][i], z[rows][i]):
                compared += 1
                np.testing.assert_array_equal(logits[rows][i], logits[16][i])
    np.testing.assert_array_equal(z[1][0], z[16][0])
    np.testing.assert_array_equal(logits[1][0], logits[16][0])
    assert compared > 20
