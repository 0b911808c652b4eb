"""The storyteller's training script, from text to a GGUF file that the engine decodes."""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from aisp_local.engine import LlamaEngine
from aisp_local.seeds import RowSeeds
from aisp_local.types import Controls, Sampling

pytestmark = [pytest.mark.native, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[1]
SYLLABLES = [a + b for a in "bdfgklmnprst" for b in ("a", "e", "i", "o", "u", "an", "el", "or")]


def stories(n: int) -> list[str]:
    """Made-up stories with words enough for a vocabulary of 512."""
    rng = random.Random(0)
    nouns = ["".join(rng.choices(SYLLABLES, k=3)) for _ in range(300)]
    made = []
    for _ in range(n):
        name, *things = rng.choice(["Lily", "Tim", "Anna", "Ben"]), *rng.sample(nouns, 4)
        made.append(
            f"Once there was a child named {name}. {name} had a {things[0]} and saw a {things[1]} in the {things[2]}. "
            f'"Look, a {things[3]}!" said {name}. Then {name} went home with the {things[0]}. They were happy.'
        )
    return made


def write_rows(path: Path, rows: Iterable[object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def test_smoke_run_writes_a_model_that_decodes(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="the training scripts need the extra [train]")
    texts = stories(240)
    write_rows(tmp_path / "lm" / "stories.train.jsonl.gz", ({"text": text} for text in texts[:200]))
    chat = (
        {
            "messages": [
                {"role": "user", "content": "Tell me a story."},
                {"role": "assistant", "content": text},
            ]
        }
        for text in texts[200:]
    )
    write_rows(tmp_path / "lm" / "story_chat.valid.jsonl.gz", chat)
    command = [sys.executable, str(ROOT / "models" / "train.py"), "--smoke"]
    command += ["--data", str(tmp_path), "--out", str(tmp_path / "tiny")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    losses = [float(line.split()[3]) for line in done.stdout.splitlines() if line.startswith("step") and "loss" in line]
    assert losses[-1] < losses[0]
    with LlamaEngine(tmp_path / "tiny" / "tiny.gguf", threads=1) as engine:
        prompt = [{"role": "user", "content": "Tell me a story."}]
        controls = Controls(n=2, sampling=Sampling(1.0))
        rollouts = engine.rollout(prompt, controls, max_tokens=8, seeds=RowSeeds(0))
    assert [1 <= len(tokens) <= 8 for tokens in rollouts.tokens] == [True, True]


def test_missing_data_is_named(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="the training scripts need the extra [train]")
    command = [sys.executable, str(ROOT / "models" / "train.py"), "--data", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "holds no folder lm" in done.stderr and "Traceback" not in done.stderr
