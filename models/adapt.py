"""Train a LoRA adapter of a shipped model by preference optimisation on its own answers, and write it as a GGUF file.

Example: python models/adapt.py --data DIR --out adapter.gguf
         aisp-local generate "Tell me a story." --lora adapter.gguf

The model answers prompts made of the training stories, the reward picks the best and the worst of eight answers each,
and DPO moves the adapter from one towards the other. No prompt of `aisp-local bench` is among them.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
if find_spec("torch") is None:
    raise SystemExit("this needs torch, which is not installed: pip install '.[train]'")

from training.batches import Document, encode  # noqa: E402
from training.corpus import Example, PromptMaker, read_stories  # noqa: E402
from training.export import read_gguf  # noqa: E402
from training.preference import Pair, Plan, add_adapter, train, write_adapter  # noqa: E402

from aisp_local import Aligner, Result, shipped  # noqa: E402

ANSWERS, PAIRS = 8, 3  # of each prompt: best and worst, second best and second worst, ...
TEMPERATURE = 0.9
LIMIT = 416


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder that holds lm/")
    parser.add_argument("--model", type=Path, default=None, help="GGUF file (default: the storyteller)")
    parser.add_argument("--reward", default=None, help="folder, file or name (default: the shipped one)")
    parser.add_argument("--out", type=Path, default=Path("adapter.gguf"))
    parser.add_argument("--pairs", type=Path, help="JSON lines of the pairs: read if the file is there, else written")
    parser.add_argument("--prompts", type=int, default=600)
    parser.add_argument("--max-tokens", type=int, default=160)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=10.0, help="time limit of the training itself")
    parser.add_argument("--max-steps", type=int, default=100_000)
    parser.add_argument("--threads", type=int, help="CPU threads for decoding")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def preferences(aligner: Aligner, prompts: list[str], max_tokens: int, seed: int) -> list[tuple[Example, Example]]:
    """Better and worse answers to each prompt, where they differ."""
    found = []
    for start in range(0, len(prompts), 16):
        some = prompts[start : start + 16]
        results = aligner.generate_many(
            [[{"role": "user", "content": prompt}] for prompt in some],
            method="best-of-n",
            budget=ANSWERS,
            n=ANSWERS,
            max_tokens=max_tokens,
            seed=seed + start,
            temperature=TEMPERATURE,
        )
        for prompt, result in zip(some, results, strict=True):
            if isinstance(result, Result):
                whole = [c for c in result.candidates if c.finish_reason == "stop" and c.text]
                for k in range(min(PAIRS, len(whole) // 2)):
                    better, worse = whole[k], whole[-1 - k]
                    if better.reward > worse.reward:
                        found.append((Example(prompt, better.text), Example(prompt, worse.text)))
        print(f"{start + len(some)} of {len(prompts)} prompts answered", flush=True)
    return found


def main() -> None:
    options = parse_arguments()
    if not (options.data / "lm").is_dir():
        raise SystemExit(f"error: {options.data} holds no folder lm; --data must name the data.")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    path = options.model or shipped.model()
    network, tokenizer = read_gguf(path)
    stories, rng = read_stories(options.data, "train"), random.Random(options.seed)
    maker = PromptMaker(stories)
    prompts = [maker.make(story, rng).prompt for story in rng.sample(stories, min(options.prompts, len(stories)))]
    if options.pairs is not None and options.pairs.exists():
        rows = [json.loads(line) for line in options.pairs.read_text(encoding="utf-8").splitlines()]
        chosen = [(Example(r["prompt"], r["chosen"]), Example(r["prompt"], r["rejected"])) for r in rows]
    else:
        with Aligner.load(path, options.reward, threads=options.threads) as aligner:
            chosen = preferences(aligner, prompts, options.max_tokens, options.seed)
        if options.pairs is not None:
            rows = [{"prompt": a.prompt, "chosen": a.answer, "rejected": b.answer} for a, b in chosen]
            options.pairs.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    pairs: list[Pair] = []
    for both in chosen:
        documents: list[Document] = encode(tokenizer, both, LIMIT)
        if len(documents) == 2:
            pairs.append((documents[0], documents[1]))
    valid = max(1, len(pairs) // 10)  # the first: no prompt is on both sides, but for one
    if len(pairs) <= valid:
        raise SystemExit(
            f"error: only {len(pairs)} prompts had answers that the reward tells apart; give more prompts."
        )
    print(f"{len(pairs)} pairs, {valid} of them held out", flush=True)
    alpha = 2.0 * options.rank
    adapters = add_adapter(network, options.rank, alpha)
    plan = Plan(minutes=options.minutes, max_steps=options.max_steps, seed=options.seed)
    train(network, adapters, pairs[valid:], pairs[:valid], plan)
    write_adapter(
        options.out, adapters, alpha, f"{path.stem} adapted to {Path(str(options.reward or 'story-reward')).stem}"
    )
    print(f"wrote {options.out} ({options.out.stat().st_size} bytes)")


if __name__ == "__main__":
    main()
