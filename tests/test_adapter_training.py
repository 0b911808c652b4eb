"""The script that makes a LoRA adapter by preference optimisation: its formulas, its file, what it does to a model."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_cli import aisp
from test_storyteller_training import ROOT, stories, write_rows

from aisp_local import Lora, shipped
from aisp_local.bench.contest import answer_logprobs
from aisp_local.engine import LlamaEngine

pytestmark = [pytest.mark.native, pytest.mark.slow]

PROMPT = "Tell me a story about a fox."
BETTER, WORSE = "Once upon a time there was a kind little fox.", "The fox was mean and hit the cat."


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("torch", reason="the training scripts need the extra [train]")
    monkeypatch.syspath_prepend(str(ROOT / "models"))
    from training import batches, corpus, export, preference

    class Training:
        def __init__(self) -> None:
            self.preference, self.example = preference, corpus.Example
            self.network, self.tokenizer = export.read_gguf(shipped.model())

        def documents(self, *answers: str) -> Any:
            return batches.encode(self.tokenizer, [corpus.Example(PROMPT, answer) for answer in answers], 416)

    return Training()


def test_the_written_adapter_is_what_was_trained(training: Any, tmp_path: Path) -> None:
    """llama.cpp gives an answer the log-probability that the network with its adapters gives it."""
    import torch

    preference = training.preference
    torch.manual_seed(0)
    adapters = preference.add_adapter(training.network, rank=4, alpha=8.0)
    assert len(adapters) == 7 * training.network.shape.layers
    moving = {name for name, p in training.network.named_parameters() if p.requires_grad}
    assert len(moving) == 2 * len(adapters) and all(name.endswith((".a", ".b")) for name in moving)
    documents = training.documents(BETTER)
    base = preference.log_probability(training.network, documents).item()
    for adapter in adapters.values():
        torch.nn.init.normal_(adapter.b, std=0.15)
    moved = preference.log_probability(training.network, documents).item()
    preference.write_adapter(tmp_path / "adapter.gguf", adapters, 8.0, "a test")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter.gguf"]
    asked = [{"role": "user", "content": PROMPT}]
    for loras, expected in (((), base), ((Lora(tmp_path / "adapter.gguf"),), moved)):
        with LlamaEngine(shipped.model(), threads=1, loras=loras) as engine:
            logprobs = answer_logprobs(engine, asked, BETTER)
        assert logprobs is not None
        # The script's documents end with the end of the turn, which is no part of an answer here.
        end = float(_end(training, documents, loras))
        assert float(logprobs.sum()) + end == pytest.approx(expected, abs=0.5)
    assert abs(moved - base) > 1.5


def _end(training: Any, documents: Any, loras: Any) -> float:
    """Log-probability of the last token, with or without what the adapters add."""
    import torch

    scales = {adapter: adapter.scale for adapter in training.network.modules() if hasattr(adapter, "scale")}
    for adapter in scales:
        adapter.scale = adapter.scale if loras else 0.0
    tokens = torch.tensor([documents[0].tokens])
    with torch.no_grad():
        logits = training.network(tokens[:, :-1]).float()
    for adapter, scale in scales.items():
        adapter.scale = scale
    return float(torch.log_softmax(logits[0, -1], 0)[tokens[0, -1]])


def test_margins_are_those_of_the_formula(training: Any) -> None:
    """DPO, Eq. 7, in numpy, of log-probabilities before and after."""
    import torch

    preference = training.preference
    pairs = [tuple(training.documents(BETTER, WORSE)), tuple(training.documents("Yes.", "No, he said."))]
    before = preference.reference(training.network, pairs, batch=1)
    adapters = preference.add_adapter(training.network, rank=2, alpha=4.0)
    with torch.no_grad():
        np.testing.assert_allclose(preference.margins(training.network, before, pairs, 0.1), 0.0, atol=1e-4)
        for adapter in adapters.values():
            torch.nn.init.normal_(adapter.b, std=0.02)
        after = [[preference.log_probability(training.network, [side]).item() for side in pair] for pair in pairs]
        found = preference.margins(training.network, before, pairs, 0.3).numpy()
    expected = [0.3 * ((b - w) - float(r)) for (b, w), r in zip(after, before, strict=True)]
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_training_favours_the_better_answers_and_keeps_the_best(training: Any) -> None:
    preference, rng = training.preference, random.Random(0)
    names = ["fox", "cat", "dog", "bird", "frog", "bear", "duck", "cow", "hen", "pig"]
    pairs = [
        tuple(training.documents(BETTER.replace("fox", name), WORSE.replace("fox", name)))
        for name in rng.sample(names, 10)
    ]
    before = preference.reference(training.network, pairs[:3], batch=3)
    adapters = preference.add_adapter(training.network, rank=4, alpha=8.0)
    plan = preference.Plan(minutes=10.0, max_steps=20, batch=4, rate=1e-3)
    preference.train(training.network, adapters, pairs[3:], pairs[:3], plan)
    loss, favoured = preference.held_out(training.network, before, pairs[:3], plan)
    assert loss < 0.6 and favoured == 1.0, "at the start the loss is the logarithm of 2"


def test_the_script_makes_an_adapter_that_generate_takes(training: Any, tmp_path: Path) -> None:
    write_rows(tmp_path / "lm" / "stories.train.jsonl.gz", ({"text": text} for text in stories(200)))
    script = [sys.executable, str(ROOT / "models" / "adapt.py"), "--threads", "1", "--out", str(tmp_path / "a.gguf")]

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*script, *arguments], capture_output=True, text=True, timeout=300)

    nowhere = run("--data", str(tmp_path / "lm"))
    assert nowhere.returncode == 1 and "holds no folder lm" in nowhere.stderr and "Traceback" not in nowhere.stderr
    few = run("--data", str(tmp_path), "--prompts", "2", "--max-tokens", "4")
    assert few.returncode == 1 and "give more prompts" in few.stderr and "Traceback" not in few.stderr
    short = ["--data", str(tmp_path), "--prompts", "10", "--max-steps", "10", "--pairs", str(tmp_path / "pairs.jsonl")]
    made = run(*short)
    assert made.returncode == 0, made.stderr
    assert "held out" in made.stdout and (tmp_path / "a.gguf").stat().st_size > 10_000
    again = run(*short)
    assert again.returncode == 0 and "prompts answered" not in again.stdout, "pairs that are there are read"
    answered = aisp("generate", PROMPT, "--lora", "a.gguf", "--budget", "2", "--max-tokens", "8", cwd=tmp_path)
    assert answered.returncode == 0 and answered.stdout.strip(), answered.stderr.decode()
