"""Scores a second and memory of a reward folder, measured in a process of its own."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aisp_local.errors import AispError
from aisp_local.reward_kit.good_bad import PAIRS
from aisp_local.rewards.base import Reward
from aisp_local.rewards.onnx import OnnxReward

LENGTHS = (128, 512, 2048)
_SECONDS = 2.0  # that one measurement should take about, if the model allows
_ROWS = 16
_SENTENCE = "The old fox ran along the river and looked for a place to rest . "


@dataclass(frozen=True)
class Size:
    """Speed at one length, in tokens; ``asked`` is more than ``tokens`` where the model reads no more."""

    asked: int
    tokens: int
    scores_per_s: float
    peak_bytes: int | None  # of the process until then, None where the system does not say


@dataclass(frozen=True)
class Measured:
    """What another process found: speed by length, and the scores that it gave the built-in responses."""

    sizes: tuple[Size, ...]
    scores: tuple[float, ...]


def measure(path: Path, module: str = "speed") -> Measured:
    """Measure a reward in a new process, which calls ``child`` of a module of this package. Raises AispError."""
    root = str(Path(__file__).resolve().parents[2])
    places = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    code = f"from aisp_local.reward_kit.{module} import child; child()"
    env = {**os.environ, "PYTHONPATH": places}
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, env=env, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise AispError(f"the process that measures the reward failed ({last})")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return Measured(tuple(Size(**size) for size in found["sizes"]), tuple(found["scores"]))


def child() -> None:
    """What that process does: print one JSON object."""
    reward = OnnxReward.load(Path(sys.argv[1]), golden=False)
    report(reward, [_size(reward, asked) for asked in LENGTHS])


def report(reward: Reward, sizes: Sequence[Size]) -> None:
    """Print what ``measure`` reads."""
    print(json.dumps({"sizes": list(map(vars, sizes)), "scores": builtin_scores(reward)}))


def builtin_scores(reward: Reward) -> list[float]:
    """Scores of the built-in pairs, one call a pair."""
    return [float(s) for pair in PAIRS for s in reward.score(pair.prompt, [pair.chosen, pair.rejected])]


def text_of(reward: OnnxReward, tokens: int) -> str:
    """A response that, with the prompt "Tell me a story.", takes about so many tokens."""
    low, high = 1, tokens
    while low < high:
        middle = (low + high) // 2
        if reward.lengths("Tell me a story.", [words(middle)])[0] < tokens:
            low = middle + 1
        else:
            high = middle
    return words(low)


def words(n: int) -> str:
    """A text of n words."""
    given = _SENTENCE.split()
    return " ".join(given[i % len(given)] for i in range(n))


def _size(reward: OnnxReward, asked: int) -> Size:
    tokens = min(asked, reward.manifest.max_length)
    text = text_of(reward, tokens)
    scores_per_s = speed_of(reward, text)
    read = reward.lengths("Tell me a story.", [text])[0]
    return Size(asked, read, scores_per_s, peak())


def speed_of(reward: Reward, text: str) -> float:
    """Scores a second of several responses at once."""
    rows: Sequence[str] = [text] * _ROWS
    began = time.perf_counter()
    reward.score("Tell me a story.", rows[:1])
    once = time.perf_counter() - began
    rows = rows[: max(1, min(_ROWS, int(_SECONDS / max(once, 1e-6))))]
    seconds: list[float] = []
    while len(seconds) < 3 and sum(seconds) < _SECONDS:
        began = time.perf_counter()
        reward.score("Tell me a story.", rows)
        seconds.append(time.perf_counter() - began)
    return len(rows) / statistics.median(seconds)


def peak() -> int | None:
    """Most bytes of memory that this process has held. From /proc: what getrusage says, a child inherits."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
