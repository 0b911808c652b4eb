"""The shipped reward here against the same network in transformers and PyTorch, float32, scores a second on a CPU.

    pip install 'aisp-local[export]'
    python benchmarks/reward_speed.py [--only shipped float32 mixed] [--repeats 5]

Both sides go from texts to scores: the PyTorch side is what a competent user would write (fast tokenizer, one padded
batch, the model with its default attention, inference mode), with the weights of the shipped ONNX file. "shipped" is
the file as it is, int8 weights that are computed in float32; "float32" is an export with its weights stored as float32;
"mixed" gives responses of 32 to 256 tokens to both. Sides run in turn, after a pause in which the threads of the other
fall asleep; a ratio is the median of those of the pairs. "others" is how many processors other processes kept busy
meanwhile: a row where that is above 0.1 is measured again, twice at most, since PyTorch's threads wait for one another.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from aisp_local.reward_kit.export import export_reward  # noqa: E402
from aisp_local.reward_kit.export.quiet import quiet  # noqa: E402
from aisp_local.reward_kit.export.source import need  # noqa: E402
from aisp_local.reward_kit.train import backbone as backbones  # noqa: E402
from aisp_local.reward_kit.train.backbone import Backbone  # noqa: E402
from aisp_local.rewards import OnnxReward  # noqa: E402

FOLDER = ROOT / "reward_models" / "story-reward"
PROMPT = "Tell me a story about a fox and a bear who look for honey in the forest."
WORDS = ("the", "fox", "ran", "to", "river", "and", "saw", "old", "trees", "where", "friends", "lived", "all", "day")
PAUSE = 0.3  # seconds; OpenMP's threads spin for 0.2 after their work
QUIET, TRIES = 0.1, 3  # processors that others may keep busy, or the row is measured again
AT_LEAST = 32  # responses a measurement: small batches are scored several times in a row


class TorchReward:
    """The same network in transformers, with its default attention."""

    def __init__(self, found: Backbone, max_length: int) -> None:
        self.model, self.tokenizer, self.max_length = found.model.eval(), found.tokenizer, max_length

    def score(self, prompt: str, responses: Sequence[str]) -> np.ndarray:
        import torch

        batch = self.tokenizer(
            [prompt] * len(responses),
            list(responses),
            padding=True,
            truncation="only_second",
            max_length=self.max_length,
            return_tensors="pt",
        )
        with torch.inference_mode():
            return self.model(**batch).logits[:, 0].numpy()


def float32_folder(found: Backbone, into: Path, max_length: int) -> Path:
    """The shipped reward exported anew with its weights stored as float32."""
    with quiet():
        found.model.save_pretrained(into / "source")
        found.tokenizer.save_pretrained(into / "source")
        export_reward(into / "source", into / "float32", precision="fp32", max_length=max_length)
    return into / "float32"


def responses(reward: OnnxReward, lengths: Sequence[int]) -> list[str]:
    """Texts that with the prompt are so many tokens."""
    rng = random.Random(0)
    found = []
    empty = reward.lengths(PROMPT, [""])[0]
    for length in lengths:
        text = " ".join(rng.choice(WORDS) for _ in range(length - empty))  # every word is one token
        assert reward.lengths(PROMPT, [text]) == [length]
        found.append(text)
    return found


def paired(sides: Sequence[Callable[[], Any]], repeats: int) -> np.ndarray:
    """Seconds [repeats, 2] of two sides, in turned order; the first round is not counted."""
    seconds = np.zeros((repeats + 1, 2))
    for i in range(repeats + 1):
        for side in (0, 1) if i % 2 else (1, 0):
            time.sleep(PAUSE)
            began = time.perf_counter()
            sides[side]()
            seconds[i, side] = time.perf_counter() - began
    return seconds[1:]


def others(since: tuple[float, float, float] | None = None) -> tuple[float, float, float]:
    """Seconds of all processors that are busy, of this process, and of the clock, since then (Linux; else zeros)."""
    try:
        ticks = [int(n) for n in Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]]
    except OSError:
        return 0.0, 0.0, 1.0
    busy = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")  # all but idle and waiting for a disk
    now = (busy, time.process_time(), time.perf_counter())
    return now if since is None else (now[0] - since[0], now[1] - since[1], now[2] - since[2])


def compare(title: str, ours: OnnxReward, theirs: TorchReward, texts: Sequence[str], repeats: int) -> dict[str, Any]:
    """One line of the table."""
    apart = float(np.abs(ours.score(PROMPT, texts) - theirs.score(PROMPT, texts)).max())
    if apart > 1e-3:
        raise SystemExit(f"error: the sides do not compute the same: scores differ by {apart:.2g}")
    calls = max(1, AT_LEAST // len(texts))

    def run(reward: OnnxReward | TorchReward) -> None:
        for _ in range(calls):
            reward.score(PROMPT, texts)

    for _ in range(TRIES):
        since = others()
        seconds = paired([lambda: run(ours), lambda: run(theirs)], repeats)
        busy, own, passed = others(since)
        load = max(0.0, (busy - own) / passed)
        if load <= QUIET:
            break
    ratios = seconds[:, 1] / seconds[:, 0]
    ours_rate, theirs_rate = calls * len(texts) / np.median(seconds, axis=0)
    ratio, low, high = float(np.median(ratios)), float(ratios.min()), float(ratios.max())
    spread = f"{ratio:.2f} ({low:.2f} to {high:.2f})"
    print(f"| {title} | {ours_rate:.1f} | {theirs_rate:.1f} | {spread} | {load:.2f} |", flush=True)
    rates = {"ours": ours_rate, "torch": theirs_rate, "ratio": ratio, "low": low, "high": high}
    return {"case": title, **rates, "others": load}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=["shipped", "float32", "mixed"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 64, 128, 256])
    options = parser.parse_args()
    need()
    import torch
    import transformers

    chosen = options.only or ["shipped", "float32", "mixed"]
    shipped = OnnxReward.load(FOLDER, providers=["CPUExecutionProvider"])
    found, longest = backbones.load(FOLDER, new_head=False), shipped.manifest.max_length
    theirs = TorchReward(found, longest)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, transformers {transformers.__version__}")
    print("\n| case | scores/s here | scores/s torch | ratio (least to most) | others |\n|---|---|---|---|---|")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in (kind for kind in ("shipped", "float32") if kind in chosen):
            path = FOLDER if kind == "shipped" else float32_folder(found, Path(folder), longest)
            ours = OnnxReward.load(path, providers=["CPUExecutionProvider"])
            for length in options.lengths:
                for n in options.batches:
                    texts = responses(ours, [length] * n)
                    title = f"{kind}, {n} x {length} tokens"
                    rows.append(compare(title, ours, theirs, texts, options.repeats))
    if "mixed" in chosen:
        rng = random.Random(1)
        for n in options.batches[1:]:
            texts = responses(shipped, [rng.randint(32, 256) for _ in range(n)])
            rows.append(compare(f"shipped, {n} of 32 to 256 tokens", shipped, theirs, texts, options.repeats))
    print(json.dumps({"processors": os.cpu_count(), "rows": rows}))


if __name__ == "__main__":
    main()
