"""LoRA adapters: the model with one is the model whose weights were merged, under controls as without."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import synthetic
from click.testing import CliRunner
from gguf import GGUFWriter

from aisp_local import Aligner, Lora, shipped
from aisp_local.cli.main import main
from aisp_local.engine import LlamaEngine
from aisp_local.errors import InputError, ModelError
from aisp_local.seeds import RowSeeds
from aisp_local.types import Controls, Want

pytestmark = pytest.mark.native

RANK, ALPHA, TOKENS = 4, 6.0, 12
PROMPT = "the fox and the hat"
Pairs = Mapping[str, tuple[np.ndarray, np.ndarray]]  # matrices A [r, in] and B [out, r] by the weight's name


def write_adapter(path: Path, pairs: Pairs, *, arch: str = "llama", kind: str = "adapter") -> Path:
    writer = GGUFWriter(str(path), arch)
    writer.add_type(kind)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", ALPHA)
    for name, (a, b) in pairs.items():
        writer.add_tensor(f"{name}.lora_a", a)
        writer.add_tensor(f"{name}.lora_b", b)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def pairs_of(model: oracle.Llama, names: list[str], seed: int = 0) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(seed)

    def pair(name: str) -> tuple[np.ndarray, np.ndarray]:
        out, width = model.w[name].shape
        a, b = rng.standard_normal((RANK, width)), rng.standard_normal((out, RANK))
        return (a * width**-0.5).astype(np.float32), (b * 0.3).astype(np.float32)

    return {name: pair(name) for name in names}


def merge(model: oracle.Llama, pairs: Pairs, scale: float = 1.0) -> oracle.Llama:
    merged = model.copy()
    merged.w = dict(model.w)
    for name, (a, b) in pairs.items():
        merged.w[name] = model.w[name] + scale * ALPHA / RANK * (b.astype(np.float64) @ a.astype(np.float64))
    return merged


NAMES = ["blk.0.attn_q.weight", "blk.0.attn_v.weight", "blk.1.ffn_up.weight", "blk.1.ffn_down.weight"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Pairs]:
    """A model, an adapter of it, and the adapter's matrices."""
    folder = tmp_path_factory.mktemp("lora")
    model = synthetic.write_llama(folder / "model.gguf", vocab="bpe")
    pairs = pairs_of(oracle.Llama(model), NAMES)
    return model, write_adapter(folder / "adapter.gguf", pairs), pairs


@pytest.mark.parametrize("scale", [1.0, 0.0, -0.5])
def test_a_model_with_an_adapter_is_the_merged_model(made: tuple[Path, Path, Pairs], scale: float) -> None:
    """Pre-logits without control, and tokens under one, against merged weights in numpy."""
    path, adapter, pairs = made
    merged = merge(oracle.Llama(path), pairs, scale)
    want: frozenset[Want] = frozenset({"prelogits", "kl", "logprobs"})
    vectors = np.random.default_rng(1).standard_normal((2, TOKENS, merged.d)).astype(np.float32)
    vectors[0] = 0
    with LlamaEngine(path, loras=[Lora(adapter, scale)]) as engine:
        rollouts = engine.rollout(PROMPT, Controls(2, vectors), max_tokens=TOKENS, seeds=RowSeeds(0), want=want)
        prompt = engine.tokens(PROMPT).tolist()
    assert rollouts.prelogits is not None and rollouts.kl is not None and rollouts.base_logprobs is not None
    for row, tokens in enumerate(rollouts.tokens):
        model = merged.copy()
        model.reset()
        for token in prompt[:-1]:
            model.step(token)
        last, kl = prompt[-1], 0.0
        for step, token in enumerate(tokens.tolist()):
            z = model.step(last)
            np.testing.assert_allclose(rollouts.prelogits[row][step], z, atol=0.02)
            base, moved = (logits - logits.max() for logits in (model.head(z), model.head(z + vectors[row, step])))
            base, moved = (x - np.log(np.exp(x).sum()) for x in (base, moved))
            assert moved[token] > moved.max() - 0.05
            assert rollouts.base_logprobs[row][step] == pytest.approx(base[token], abs=0.03)
            kl += float((np.exp(moved) * (moved - base)).sum())
            last = token
        assert rollouts.kl[row] == pytest.approx(kl, rel=0.02, abs=1e-3)


def test_adapters_add_up(made: tuple[Path, Path, Pairs], tmp_path: Path) -> None:
    path, adapter, pairs = made
    other = pairs_of(oracle.Llama(path), NAMES[1:3], seed=5)
    second = write_adapter(tmp_path / "second.gguf", other)
    merged = merge(merge(oracle.Llama(path), pairs, 0.5), other)
    with LlamaEngine(path, loras=[Lora(adapter, 0.5), second]) as engine:
        want: frozenset[Want] = frozenset({"prelogits"})
        rollouts = engine.rollout(PROMPT, Controls(1), max_tokens=1, seeds=RowSeeds(0), want=want)
        prompt = engine.tokens(PROMPT).tolist()
    merged.reset()
    z = [merged.step(token) for token in prompt][-1]
    assert rollouts.prelogits is not None
    np.testing.assert_allclose(rollouts.prelogits[0][0], z, atol=0.02)


def test_another_adapter_is_another_model(made: tuple[Path, Path, Pairs]) -> None:
    """Steering that was learnt with one is refused without it."""
    path, adapter, _ = made
    prints = []
    for loras in ([], [adapter], [Lora(adapter, 0.5)], [Lora(adapter, 1.0)]):
        with LlamaEngine(path, threads=1, loras=loras) as engine:
            prints.append(engine.fingerprint)
    assert len(set(prints)) == 3 and prints[1] == prints[3]


@pytest.mark.parametrize("tied", [False, True])
def test_adapters_of_the_output_matrix_are_refused(tied: bool, tmp_path: Path) -> None:
    path = synthetic.write_llama(tmp_path / "model.gguf", vocab="bpe", tied=tied)
    name = "token_embd.weight" if tied else "output.weight"
    pairs = pairs_of(oracle.Llama(path), [name])
    if tied:  # llama.cpp wants the matrices of an embedding the other way round
        pairs = {name: (pairs[name][1], np.ascontiguousarray(pairs[name][0].T))}
    adapter = write_adapter(tmp_path / "adapter.gguf", pairs)
    with pytest.raises(ModelError, match="adapts the output matrix"):
        LlamaEngine(path, threads=1, loras=[adapter])


def test_what_is_no_adapter_of_the_model(made: tuple[Path, Path, Pairs], tmp_path: Path) -> None:
    path, adapter, pairs = made
    (tmp_path / "text.gguf").write_text("no adapter")
    wrong = {NAMES[0]: (np.zeros((RANK, 7), np.float32), np.zeros((9, RANK), np.float32))}
    (tmp_path / "cut.gguf").write_bytes(adapter.read_bytes()[:-1000])
    for bad, message in (
        (tmp_path / "missing.gguf", "cannot be read"),
        (tmp_path, "cannot be read"),
        (tmp_path / "text.gguf", "is not a GGUF file"),
        (tmp_path / "cut.gguf", "cannot be loaded as a LoRA adapter"),
        (path, "cannot be loaded as a LoRA adapter"),
        (write_adapter(tmp_path / "other.gguf", pairs, arch="qwen2"), "cannot be loaded as a LoRA adapter"),
        (write_adapter(tmp_path / "wrong.gguf", wrong), "cannot be loaded as a LoRA adapter"),
    ):
        with pytest.raises(ModelError, match=message):
            LlamaEngine(path, threads=1, loras=[bad])
    with pytest.raises(InputError, match="must be a number"):
        LlamaEngine(path, threads=1, loras=[Lora(adapter, float("nan"))])


def test_the_command_takes_adapters(tmp_path: Path) -> None:
    """On the shipped model; a scale of 0 changes nothing."""
    with LlamaEngine(shipped.model(), threads=1) as engine:
        d = engine.d
    rng = np.random.default_rng(0)
    pair = rng.standard_normal((RANK, d), np.float32), rng.standard_normal((d, RANK), np.float32)
    adapter = str(write_adapter(tmp_path / "adapter.gguf", {"blk.0.attn_output.weight": pair}))
    short = ["generate", "Tell me a story.", "--budget", "2", "--method", "best-of-n", "--max-tokens", "12", "--json"]

    def answer(*options: str) -> str:
        out = CliRunner().invoke(main, [*short, *options])
        assert out.exit_code == 0, out.output
        return str(json.loads(out.stdout)["answer"])

    plain = answer()
    assert answer("--lora-scaled", adapter, "0") == plain
    assert answer("--lora", adapter) != plain
    assert (
        answer("--lora", adapter)
        == Aligner.load(loras=[adapter])
        .generate([{"role": "user", "content": "Tell me a story."}], budget=2, method="best-of-n", max_tokens=12)
        .answer
    )
    out = CliRunner().invoke(main, [*short, "--lora", str(tmp_path / "none.gguf")])
    assert out.exit_code == 2 and "cannot be read" in out.output


def test_a_model_that_must_be_loaded_again_keeps_its_adapter_or_fails(tmp_path: Path) -> None:
    """As those of two sets of rope factors are: never the base model in silence."""
    path = synthetic.write_llama(tmp_path / "model.gguf", vocab="bpe")
    pairs = pairs_of(oracle.Llama(path), NAMES)
    adapter = write_adapter(tmp_path / "adapter.gguf", pairs)
    short: dict[str, Any] = {"max_tokens": 4, "seeds": RowSeeds(0)}
    with LlamaEngine(path, threads=1) as plain, LlamaEngine(path, threads=1, loras=[adapter]) as engine:
        model = engine.model
        before = engine.rollout(PROMPT, Controls(1), **short).tokens[0].tolist()
        engine.forget()
        engine._drop_context()
        model.reload({"llama.context_length": 400})
        assert engine.rollout(PROMPT, Controls(1), **short).tokens[0].tolist() == before
        assert before != plain.rollout(PROMPT, Controls(1), **short).tokens[0].tolist()
        # The adapter is gone: an error now and later, until it is back.
        engine._drop_context()
        moved = adapter.rename(tmp_path / "moved.gguf")
        for _ in range(2):
            with pytest.raises(ModelError, match="is gone|changed"):
                model.reload({})
        moved.rename(adapter)
        model.reload({})
        assert engine.rollout(PROMPT, Controls(1), **short).tokens[0].tolist() == before
        # One of the same name that is another.
        engine._drop_context()
        write_adapter(adapter, pairs_of(oracle.Llama(path), NAMES, seed=9))
        with pytest.raises(ModelError, match="changed"):
            model.reload({"llama.context_length": 400})


def test_an_adapter_that_cannot_be_loaded_again_leaves_no_model_without_it(
    made: tuple[Path, Path, Pairs], monkeypatch: pytest.MonkeyPatch
) -> None:
    from aisp_local.native import lora

    path, adapter, _ = made
    with LlamaEngine(path, threads=1, loras=[adapter]) as engine:
        expected = engine.rollout(PROMPT, Controls(1), max_tokens=4, seeds=RowSeeds(0)).tokens[0].tolist()
        engine._drop_context()
        real = lora.load
        monkeypatch.setattr(lora, "load", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            engine.model.reload({"llama.context_length": 400})
        assert engine.model.adapters == []
        monkeypatch.setattr(lora, "load", real)
        engine.model.overrides = {}
        found = engine.rollout(PROMPT, Controls(1), max_tokens=4, seeds=RowSeeds(0)).tokens[0].tolist()
        assert found == expected
