"""Controls by callback, as on a stock llama-cpp-python, against controls in the graph."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
import synthetic

from aisp_local import Aligner, shipped
from aisp_local.engine import LlamaEngine
from aisp_local.errors import BindingError, DecodeError, ModelError
from aisp_local.native import FallbackWarning, binding
from aisp_local.seeds import RowSeeds
from aisp_local.types import Controls, Rollouts, Sampling

pytestmark = pytest.mark.native

N, STEPS = 5, 12
NEEDS_THE_PATCH = {
    "minicpm3": "not the input of its output matrix",  # scaled in between
    "plamo3": "no node 'result_norm'",
}
ARCHITECTURES = [name for name in synthetic.GENERATORS if name not in NEEDS_THE_PATCH]


def rollouts(path: Path, control: Any, *, held: bool = False, n: int = N) -> Rollouts:
    with LlamaEngine(path, control=control, threads=1) as engine:
        shape = (n, 1 if held else STEPS // 2, engine.d)
        v = np.random.default_rng(4).standard_normal(shape, np.float32)
        controls = Controls(n, v, held, Sampling(temperature=0.8, top_p=0.9))
        want: Any = frozenset({"kl", "logprobs", "prelogits"})
        return engine.rollout("Once upon a time", controls, max_tokens=STEPS, seeds=RowSeeds(1), want=want)


def same(one: Rollouts, other: Rollouts) -> bool:
    """Tokens, pre-logits and KL, bit for bit."""
    assert one.prelogits is not None and other.prelogits is not None
    assert one.kl is not None and other.kl is not None
    tokens = all(np.array_equal(a, b) for a, b in zip(one.tokens, other.tokens, strict=True))
    z = all(a.tobytes() == b.tobytes() for a, b in zip(one.prelogits, other.prelogits, strict=True))
    return tokens and z and one.kl.tobytes() == other.kl.tobytes()


@pytest.mark.parametrize("held", [False, True])
def test_the_shipped_model_gives_the_same_rollouts_bit_for_bit(held: bool) -> None:
    in_graph = rollouts(shipped.model(), "graph", held=held)
    assert same(in_graph, rollouts(shipped.model(), "callback", held=held))
    assert in_graph.kl is not None and (in_graph.kl > 0.1).all()  # the controls did something


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_architectures_give_the_same_rollouts_bit_for_bit(arch: str, tmp_path: Path) -> None:
    path = synthetic.write(tmp_path / f"{arch}.gguf", arch, vocab="bpe")
    assert same(rollouts(path, "graph"), rollouts(path, "callback"))


@pytest.mark.parametrize(("arch", "reason"), NEEDS_THE_PATCH.items())
def test_what_the_callback_cannot_do_is_refused_and_the_base_model_still_answers(
    arch: str, reason: str, tmp_path: Path
) -> None:
    path = synthetic.write(tmp_path / f"{arch}.gguf", arch, vocab="bpe")
    assert rollouts(path, "graph").n_tokens
    with pytest.raises(ModelError, match=f"'{arch}' needs the patched llama-cpp-python .*{reason}"):
        rollouts(path, "callback")
    with LlamaEngine(path, control="callback", threads=1) as engine:
        base = engine.rollout("Once", Controls(2), max_tokens=4, seeds=RowSeeds(1))
    assert base.n_tokens


def test_an_edit_that_does_not_reach_the_logits_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from aisp_local.engine.head import OutputHead

    scrambled = OutputHead.project_first
    monkeypatch.setattr(OutputHead, "project_first", lambda self, z: scrambled(self, z[..., ::-1]))
    with pytest.raises(ModelError, match="not the input of its output matrix"):
        rollouts(shipped.model(), "callback")


def test_an_error_inside_the_callback_comes_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from aisp_local.native.callback import CallbackControl

    def fail(*_: object) -> None:
        raise DecodeError("no luck")

    monkeypatch.setattr(CallbackControl, "_edit", fail)
    with pytest.raises(DecodeError, match="no luck"):
        rollouts(shipped.model(), "callback")


def as_stock(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    """The binding as if it had neither been patched nor imported."""
    for name in (*binding.SYMBOLS, binding.SAMPLE_SYMBOL):
        monkeypatch.delattr(llama_cpp, name)
    monkeypatch.setattr(llama_cpp, "__version__", version)
    monkeypatch.setattr(binding, "_llama", None)


def test_a_stock_build_warns_once_and_searches(monkeypatch: pytest.MonkeyPatch) -> None:
    with Aligner.load() as aligner:
        expected = aligner.generate("Once upon a time", budget=8, n=4, max_tokens=12)
    as_stock(monkeypatch, "0.3.30")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            with Aligner.load() as aligner:
                result = aligner.generate("Once upon a time", budget=8, n=4, max_tokens=12)
    assert [w.category for w in caught] == [FallbackWarning]
    assert "llama-cpp-python 0.3.30 lacks the patch" in str(caught[0].message)
    assert [(c.text, c.reward) for c in result.candidates] == [(c.text, c.reward) for c in expected.candidates]
    with pytest.raises(BindingError, match="lacks the patch of aisp-local; install it with: pip install ./patches"):
        rollouts(shipped.model(), "graph")


def test_a_build_that_is_too_old_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    as_stock(monkeypatch, "0.3.29")
    with pytest.raises(BindingError, match=r"0\.3\.29 is too old, 0\.3\.30 is the oldest"):
        LlamaEngine(shipped.model())


def test_the_command_line_says_it_in_one_line() -> None:
    code = (
        "import llama_cpp; from aisp_local.native import binding\n"
        "for name in (*binding.SYMBOLS, binding.SAMPLE_SYMBOL): delattr(llama_cpp, name)\n"
        "from aisp_local.cli.main import main\n"
        "main(['generate', 'Hello', '--budget', '4', '--max-tokens', '4'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip()
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("aisp-local: llama-cpp-python ")
    assert "pip install ./patches" in lines[0]
