"""AISP here against AISP in Hugging Face transformers and PyTorch: same weights, prompt, controls and budget.

    pip install torch transformers        (nothing else in the project needs transformers)
    python benchmarks/torch_aisp.py [--repeats 5] [-m model.gguf]

The PyTorch side is what a competent user would write: the prompt is prefilled once a run and its cache expanded to all
rows, a batch a step, attention by torch's own kernel, no gradient; dense in float32 and bfloat16, and with the weights
packed as in the file, which transformers can do as well: the fastest counts.
Both sides ask and tell the same controller and get the same rewards from a table, so rewards cost neither anything.
Printed: seconds a run in turn, the median of the paired ratios with quartiles, and how far the rollouts of both sides
agree: the mean share of a rollout's tokens before the first difference. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, GgufConfig

from aisp_local import shipped
from aisp_local.bench import synthetic
from aisp_local.bench.speed import paired, prompt_of, ratio
from aisp_local.controllers.aisp import Aisp
from aisp_local.engine import LlamaEngine
from aisp_local.seeds import RowSeeds
from aisp_local.types import Rollouts

ITERATIONS = 2


VARIANTS = {
    "float32": (torch.float32, True),
    "bfloat16": (torch.bfloat16, True),
    "packed": (torch.float32, False),
}
"""Type, and whether the weights are unpacked into dense matrices."""


def rollouts_of(tokens: list[np.ndarray]) -> Rollouts:
    return Rollouts(tokens, [""] * len(tokens), ["length"] * len(tokens), 0.0, sum(map(len, tokens)))


class TorchEngine:
    """Rollouts of one prompt under controls, in transformers."""

    def __init__(self, path: Path, dtype: torch.dtype, dense: bool, ends: set[int]) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            str(path.parent),
            gguf_file=path.name,
            dtype=dtype,
            attn_implementation="sdpa",
            quantization_config=GgufConfig(dequantize=dense),
        )
        self.model.eval()
        self.dtype, self.ends = dtype, torch.tensor(sorted(ends))
        self.cache: Any = None

    @torch.inference_mode()
    def prefill(self, prompt: np.ndarray) -> None:
        ids = torch.from_numpy(prompt[:-1].astype(np.int64))[None]
        self.cache = self.model.model(input_ids=ids, use_cache=True).past_key_values
        self.last = int(prompt[-1])

    @torch.inference_mode()
    def rollout(self, v: np.ndarray, steps: int) -> list[np.ndarray]:
        import copy

        n = len(v)
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(n)
        controls = torch.from_numpy(v).to(self.dtype)
        current = torch.full((n, 1), self.last, dtype=torch.int64)
        out = torch.zeros((n, steps), dtype=torch.int64)
        lengths = torch.full((n,), steps)
        running = torch.ones(n, dtype=torch.bool)
        for t in range(steps):
            hidden = self.model.model(input_ids=current, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]
            logits = self.model.lm_head(hidden + controls[:, t])
            token = logits.argmax(dim=-1)
            out[:, t] = token
            ended = torch.isin(token, self.ends) & running
            lengths[ended] = t + 1
            running &= ~ended
            if not running.any():
                break
            current = token[:, None]
        return [row[:length].numpy().astype(np.int32) for row, length in zip(out, lengths.tolist(), strict=True)]


def run(engine: Callable[[Any, int], list[np.ndarray]], d: int, n: int, steps: int) -> list[np.ndarray]:
    """The published method for a few iterations; all tokens."""
    controller = Aisp(d=d, max_tokens=steps, seed=3, sigma=0.3)
    rewards = np.random.default_rng(0).standard_normal((ITERATIONS, n))
    every: list[np.ndarray] = []
    for iteration in range(ITERATIONS):
        tokens = engine(controller.ask(n), iteration + 1)
        controller.tell(rollouts_of(tokens), rewards[iteration])
        every += tokens
    return every


def agreement(a: list[np.ndarray], b: list[np.ndarray]) -> float:
    shares = []
    for x, y in zip(a, b, strict=True):
        k = min(len(x), len(y))
        differs = np.flatnonzero(x[:k] != y[:k])
        shares.append((differs[0] if len(differs) else k) / max(len(x), len(y)))
    return float(np.mean(shares))


def measure(path: Path, n: int, prompt: int, steps: int, repeats: int) -> dict[str, Any]:
    with LlamaEngine(path) as engine:
        text = prompt_of(engine, prompt)
        ids = engine.tokens(text)
        ends = set(np.flatnonzero(engine.model.eog).tolist())
        said: dict[str, list[np.ndarray]] = {}

        def ours() -> float:
            start = time.perf_counter()

            def roll(controls: Any, iteration: int) -> list[np.ndarray]:
                seeds = RowSeeds(3, 0, iteration)
                return list(engine.rollout(text, controls, max_tokens=steps, seeds=seeds).tokens)

            engine.forget()  # the prompt is prefilled once a run, as on the other side
            said["ours"] = run(roll, engine.d, n, steps)
            return time.perf_counter() - start

        def theirs(name: str, torch_engine: TorchEngine) -> float:
            start = time.perf_counter()
            torch_engine.prefill(ids)
            said[name] = run(lambda controls, _: torch_engine.rollout(controls.vectors, steps), engine.d, n, steps)
            return time.perf_counter() - start

        torch.set_num_threads(engine.settings["threads"])
        others = {name: TorchEngine(path, *variant, ends) for name, variant in VARIANTS.items()}
        runs = [ours, *(lambda name=name, other=other: theirs(name, other) for name, other in others.items())]
        seconds = paired(runs, repeats)
    middle = np.median(seconds, axis=0)
    best = 1 + int(np.argmin(middle[1:]))
    return {
        "model": path.stem,
        "n": n,
        "prompt": len(ids),
        "tokens": steps,
        "seconds": {"aisp-local": middle[0], **dict(zip(VARIANTS, middle[1:].tolist(), strict=True))},
        "better": list(VARIANTS)[best - 1],
        "ratio": ratio(seconds[:, best], seconds[:, 0]),
        "agreement": {name: agreement(said["ours"], said[name]) for name in VARIANTS},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("-m", "--model", type=Path, help="another GGUF that transformers can read")
    options = parser.parse_args()
    large = synthetic.cached(synthetic.Shape())
    cases = [(shipped.model(), 32, 24, 96), (large, 8, 256, 48), (large, 32, 256, 48)]
    if options.model:
        cases = [(options.model, 8, 256, 48), (options.model, 32, 256, 48)]
    results = [measure(*case, options.repeats) for case in cases]
    print("| model | n | prompt | new tokens | aisp-local, s | " + ", s | ".join(VARIANTS) + ", s | best over ours |")
    print("|---|---|---|---|---|" + "---|" * (len(VARIANTS) + 1))
    for r in results:
        seconds = r["seconds"]
        sides = [f"{seconds[name]:.2f} (agreement {r['agreement'][name]:.2f})" for name in VARIANTS]
        middle, low, high = r["ratio"]
        cells = [r["model"], r["n"], r["prompt"], r["tokens"], f"{seconds['aisp-local']:.2f}", *sides]
        print("| " + " | ".join(map(str, cells)) + f" | {middle:.2f} ({low:.2f} to {high:.2f}) |")
    print(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads(), "results": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
