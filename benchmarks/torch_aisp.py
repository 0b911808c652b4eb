"""AISP here against AISP in Hugging Face transformers and PyTorch: same weights, prompt, controls and budget.

    pip install torch transformers        (nothing else in the project needs transformers)
    python benchmarks/torch_aisp.py [--repeats 5] [-m model.gguf [--rows 8 32] [--prompt 256] [--tokens 48]]
                                    [--device cuda]

The PyTorch side is what a competent user would write: the prompt is prefilled once a run and its cache expanded to all
rows, a batch a step, attention by torch's own kernel, no gradient; dense in float32 and bfloat16, and with the weights
packed as in the file, which transformers can do as well: the fastest counts. On a GPU it is bfloat16 (of a llama), by
transformers and as "static": a step over a cache of fixed size, whose kernels CUDA replays as one graph.
Both sides ask and tell the same controller and get the same rewards from a table, so rewards cost neither anything.
In the same turns a bare loop over llama_decode, prompt and tokens those of ours: as fast as ours could be at best.
Printed: seconds a run in turn, the tokens that each side decoded in it, the median of the paired ratios with quartiles,
and how far the rollouts of both sides agree. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aisp_local import shipped
from aisp_local.bench import synthetic
from aisp_local.bench.raw import RawLoop
from aisp_local.bench.tables import paired, ratio
from aisp_local.bench.workload import prompt_of
from aisp_local.controllers.aisp import Aisp
from aisp_local.engine import LlamaEngine
from aisp_local.seeds import RowSeeds
from aisp_local.types import Rollouts

if TYPE_CHECKING:
    from torch_engine import TorchEngine

ITERATIONS = 2

AGREEMENT = """Tokens: of all rollouts of a run, up to their ends; PyTorch's rows go on beside those that still decode.
Agreement: the mean share of a rollout's tokens before the first that differs from ours. What follows a different token
is another text, so that one near tie early in a rollout ends its agreement, on a trained model too: tokens are chosen
greedily under noise, and the sides round differently (bfloat16; here activations of eight bits). Where lengths differ
then, so do the controls of the next iteration. Low agreement is not less work, which the tokens show."""


def rollouts_of(tokens: list[np.ndarray]) -> Rollouts:
    return Rollouts(tokens, [""] * len(tokens), ["length"] * len(tokens), 0.0, sum(map(len, tokens)))


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


def measure(
    path: Path, n: int, prompt: int, steps: int, repeats: int, device: str = "cpu", static: bool = False
) -> dict[str, Any]:
    import torch
    from torch_engine import load

    with LlamaEngine(path) as engine:
        text = prompt_of(engine, prompt)
        ids = engine.tokens(text)
        ends = frozenset(np.flatnonzero(engine.model.eog).tolist())
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

        def bare() -> float:
            start = time.perf_counter()
            raw.start(ids[:-1], 0)
            prefill = time.perf_counter() - start
            every = said["ours"]
            return prefill + sum(raw.replay(ids, every[i : i + n]) for i in range(0, len(every), n))

        ours()  # makes the context whose settings the bare loop takes
        raw = RawLoop(engine.model, rows=n, **engine.settings)
        torch.set_num_threads(engine.settings["threads"])
        others = load(path, device, static, ends)
        runs = [ours, bare, *(lambda name=name, other=other: theirs(name, other) for name, other in others.items())]
        # The bare loop decodes the tokens that ours gave, which are the same in every run.
        seconds = paired(runs, repeats)
        raw.close()
    middle = np.median(seconds, axis=0)
    best = 2 + int(np.argmin(middle[2:]))
    return {
        "model": path.stem,
        "n": n,
        "prompt": len(ids),
        "tokens": steps,
        "seconds": {"aisp-local": middle[0], "raw": middle[1], **dict(zip(others, middle[2:].tolist(), strict=True))},
        "better": list(others)[best - 2],
        "ratio": ratio(seconds[:, best], seconds[:, 0]),
        "over raw": ratio(seconds[:, best], seconds[:, 1]),
        "agreement": {name: agreement(said["ours"], said[name]) for name in others},
        "decoded": {name: sum(map(len, every)) for name, every in said.items()},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("-m", "--model", type=Path, help="another GGUF that transformers can read")
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 32], help="rollouts an iteration, for -m")
    parser.add_argument("--prompt", type=int, default=256, help="its tokens, for -m")
    parser.add_argument("--tokens", type=int, default=48, help="new ones, for -m")
    parser.add_argument("--device", default="cpu", help="of PyTorch; ours decodes where it was built for")
    parser.add_argument("--static", action="store_true", help="on a CPU too: what a GPU is compared to")
    options = parser.parse_args()
    try:
        import torch
        import transformers  # noqa: F401
    except ImportError as error:
        parser.error(f"{error}; install it with: pip install torch transformers")
    static = options.static or options.device != "cpu"
    if options.model:
        cases = [(options.model, n, options.prompt, options.tokens) for n in options.rows]
    else:
        large = synthetic.cached(synthetic.Shape())
        cases = [(large, 8, 256, 48), (large, 32, 256, 48)]
        cases = cases if static else [(shipped.model(), 32, 24, 96), *cases]
    results = [measure(*case, options.repeats, options.device, static) for case in cases]
    names = list(results[0]["agreement"])
    head = ["model", "n", "prompt", "new tokens", "aisp-local, s", "bare llama_decode, s", *(f"{x}, s" for x in names)]
    head += ["best over ours", "best over bare"]
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for r in results:
        seconds = r["seconds"]
        decoded, share = r["decoded"], r["agreement"]
        sides = [f"{seconds[x]:.2f} ({decoded[x]} tokens, agreement {share[x]:.2f})" for x in names]
        over = ["{:.2f} ({:.2f} to {:.2f})".format(*r[which]) for which in ("ratio", "over raw")]
        ours = [f"{seconds[which]:.2f} ({decoded['ours']} tokens)" for which in ("aisp-local", "raw")]
        cells = [r["model"], r["n"], r["prompt"], r["tokens"], *ours, *sides, *over]
        print("| " + " | ".join(map(str, cells)) + " |")
    print("\n" + AGREEMENT + "\n")
    print(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads(), "results": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
