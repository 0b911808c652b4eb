"""The models of random weights that measurements use."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from gguf.quants import dequantize

from aisp_local.bench import synthetic
from aisp_local.engine import LlamaEngine
from aisp_local.seeds import RowSeeds
from aisp_local.types import Controls

SHAPE = synthetic.Shape(1000, 256, 8, 4, 512, 512, kv_heads=2, kind="Q4_K_M")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.write(tmp_path_factory.mktemp("bench") / "model.gguf", SHAPE)


def test_q4_k_m_has_llama_cpps_mixture(path: Path) -> None:
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(path).tensors}
    assert kinds["token_embd.weight"] == "Q4_K" and kinds["output.weight"] == "Q6_K"
    assert all(kinds[f"blk.{i}.attn_q.weight"] == "Q4_K" for i in range(8))
    more = [i for i in range(8) if kinds[f"blk.{i}.ffn_down.weight"] == "Q6_K"]
    assert more == [0, 3, 6, 7] and more == [i for i in range(8) if kinds[f"blk.{i}.attn_v.weight"] == "Q6_K"]


def test_random_quanta_keep_the_length_of_what_passes_through(path: Path) -> None:
    for tensor in GGUFReader(path).tensors:
        if len(tensor.shape) == 2:
            weights = dequantize(tensor.data, tensor.tensor_type) * np.sqrt(float(tensor.shape[0]))
            assert abs(weights.mean()) < 0.02 and abs(weights.std() - 1) < 0.02
            assert len(np.unique(weights[:, 0])) > 8  # rows differ


def test_the_8b_model_is_as_large_as_its_name_says() -> None:
    shape, per = synthetic.LLAMA_8B, 0
    head = shape.width // shape.heads
    assert shape.kv_heads is not None
    per += 2 * shape.width * (shape.width + head * shape.kv_heads) + 3 * shape.width * shape.hidden
    assert 7.9e9 < shape.layers * per + 2 * shape.vocabulary * shape.width < 8.1e9


@pytest.mark.native
def test_the_engine_decodes_it(path: Path) -> None:
    with LlamaEngine(path) as engine:
        done = engine.rollout("ab", Controls(2), max_tokens=4, seeds=RowSeeds(1))
        assert engine.model.kv_bytes_per_token == 8 * 2 * (64 + 64) * 2
    assert done.n_tokens > 2
