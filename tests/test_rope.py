"""Models with two sets of rope factors: which one llama.cpp takes depends on one sequence, not on the whole cache."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic
from gguf import GGUFReader
from raw import Raw

from aisp_local.engine import LlamaEngine
from aisp_local.errors import ModelError
from aisp_local.seeds import RowSeeds
from aisp_local.types import Controls, Rollouts

pytestmark = pytest.mark.native

BOUND, STEPS = 512, 12
SHORT = "The cat sat on the mat. "
LONG = SHORT * 20  # with the response beyond the bound, alone not


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = {
        "vocab_size": 320,
        "context_length": 4096,
        "rope.scaling.original_context_length": BOUND,
    }
    path = synthetic.write(
        tmp_path_factory.mktemp("models") / "phi3.gguf", "phi3", synthetic._ANY | settings, vocab="bpe"
    )
    for tensor in GGUFReader(path, "r+").tensors:
        if tensor.name.startswith("rope_factors"):
            tensor.data[:] = np.linspace(1, 32 if "long" in tensor.name else 1.5, len(tensor.data))
    return path


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, int]]:
    """What each load of a model was told about its metadata."""
    from aisp_local.native.model import Model

    told: list[dict[str, int]] = []
    real = Model._load
    monkeypatch.setattr(Model, "_load", lambda self: (told.append(self.overrides), real(self))[1])
    return told


def alone(path: Path, engine: LlamaEngine, text: str, n_ctx: int) -> tuple[list[int], list[float]]:
    """Greedy tokens, and their log-probabilities, of llama.cpp with one sequence in a context of that length."""
    prompt = engine.tokens(text)
    tokens: list[int] = []
    logprobs: list[float] = []
    with Raw(path, n_seq=1, n_ctx=n_ctx) as raw:
        raw.decode(prompt, range(len(prompt)), [0] * len(prompt))
        row = len(prompt) - 1
        for t in range(STEPS):
            logits = raw.logits(row).astype(np.float64)
            tokens.append(int(logits.argmax()))
            logprobs.append(float(-np.log(np.exp(logits - logits.max()).sum())))
            raw.decode([tokens[-1]], [len(prompt) + t], [0])
            row = 0
    return tokens, logprobs


def rollout(engine: LlamaEngine, text: str, n: int = 6, max_tokens: int = 150) -> Rollouts:
    want: Any = frozenset({"logprobs"})
    stop = [0]

    def after_some_steps() -> bool:
        stop[0] += 1
        return stop[0] > STEPS

    return engine.rollout(
        text, Controls(n), max_tokens=max_tokens, seeds=RowSeeds(1), want=want, should_stop=after_some_steps
    )


def agrees(out: Rollouts, expected: tuple[list[int], list[float]]) -> bool:
    assert out.base_logprobs is not None
    return all(row.tolist() == expected[0] for row in out.tokens) and all(
        np.allclose(row, expected[1], atol=0.03) for row in out.base_logprobs
    )


@pytest.mark.parametrize("control", ["graph", "callback"])
def test_a_large_cache_of_short_sequences_keeps_the_short_factors(
    path: Path, loads: list[dict[str, int]], control: Any
) -> None:
    with LlamaEngine(path, threads=1, control=control) as engine:
        assert len(engine.tokens(LONG)) < BOUND < len(engine.tokens(LONG)) + 150
        short = alone(path, engine, SHORT, BOUND)
        wrong = alone(path, engine, SHORT, 2 * BOUND)
        long = alone(path, engine, LONG, 2 * BOUND)
        assert short[0] != wrong[0] and long[0] != alone(path, engine, LONG, BOUND)[0]
        assert agrees(rollout(engine, SHORT, n=1), short) and len(loads) == 1
        first = rollout(engine, SHORT)
        assert agrees(first, short) and engine.settings["n_ctx"] > BOUND
        assert agrees(rollout(engine, SHORT, n=8), short) and len(loads) == 2
        assert agrees(rollout(engine, LONG), long) and len(loads) == 3  # a longer prompt: the context is made again
        # What the prompt can need decides, not its length; and the largest context so far is no reason for long ones.
        assert agrees(rollout(engine, LONG, max_tokens=STEPS), alone(path, engine, LONG, BOUND)) and len(loads) == 4
        again = rollout(engine, SHORT)
        assert agrees(again, short) and len(loads) == 4
    assert [told == {} for told in loads] == [True, False, True, False]
    with LlamaEngine(path, threads=1, control=control) as engine:
        fresh = rollout(engine, SHORT)
    assert all(np.array_equal(a, b) for a, b in zip(fresh.tokens, again.tokens, strict=True))


def test_the_bound_itself_is_short(path: Path) -> None:
    """As llama.cpp has it for a context of exactly the bound; the last token of a response is never decoded."""
    with LlamaEngine(path, threads=1) as engine:
        left = BOUND - len(engine.tokens(SHORT)) + 1
        for max_tokens, n_ctx in ((left, BOUND), (left + 1, 2 * BOUND)):
            for n in (1, 3):
                expected = alone(path, engine, SHORT, n_ctx)
                assert agrees(rollout(engine, SHORT, n=n, max_tokens=max_tokens), expected), (max_tokens, n)


def test_other_models_are_loaded_once(loads: list[dict[str, int]], tmp_path: Path) -> None:
    """Also with the same metadata: YaRN has one set of factors, whatever the length."""
    settings = synthetic._ANY | {"vocab_size": 320, "rope.scaling.original_context_length": 64, "context_length": 4096}
    path = synthetic.write(tmp_path / "qwen3.gguf", "qwen3", settings, vocab="bpe")
    with LlamaEngine(path, threads=1) as engine:
        expected = alone(path, engine, SHORT, BOUND)
        for n in (1, 8):
            assert agrees(rollout(engine, SHORT, n=n), expected)
    assert len(loads) == 1


def test_a_file_that_was_replaced_is_not_taken_for_the_model(path: Path, tmp_path: Path) -> None:
    own = shutil.copy(path, tmp_path / "own.gguf")
    with LlamaEngine(own, threads=1) as engine:
        before = rollout(engine, SHORT, n=1)
        os.replace(shutil.copy(path, tmp_path / "other.gguf"), own)
        for _ in range(2):
            with pytest.raises(ModelError, match="has changed since it was loaded"):
                rollout(engine, SHORT)
            after = rollout(engine, SHORT, n=1)  # what needs no other factors still works
            assert np.array_equal(before.tokens[0], after.tokens[0])
