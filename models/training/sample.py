"""Write the model's own answers to prompts of the corpus as JSON lines.

Example: python models/training/sample.py --model models/storyteller/storyteller.gguf \
    --data DIR --split train --n 6000 --temperatures 0.5,0.8,1.0 --out samples.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if find_spec("torch") is None:
    raise SystemExit("this needs torch, which is not installed: pip install '.[train]'")

import torch  # noqa: E402

from training.corpus import read_chat  # noqa: E402
from training.export import read_model  # noqa: E402
from training.sampling import Answer, sample  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="GGUF file or checkpoint")
    parser.add_argument("--data", type=Path, required=True, help="folder that holds lm/")
    parser.add_argument("--split", choices=("train", "valid"), default="train")
    parser.add_argument("--n", type=int, default=600, help="number of answers")
    parser.add_argument("--temperatures", default="0.5,0.8,1.0", help="taken in turn")
    parser.add_argument("--max-tokens", type=int, default=300)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    temperatures = [float(value) for value in options.temperatures.split(",")]
    network, tokenizer = read_model(options.model)
    examples = read_chat(options.data, options.split)
    random.Random(options.seed).shuffle(examples)
    chosen = [examples[i % len(examples)] for i in range(options.n)]
    heat = [temperatures[i % len(temperatures)] for i in range(options.n)]
    temporary = options.out.with_suffix(".tmp")
    started, written = time.monotonic(), 0

    def answer(start: int) -> list[Answer]:
        part = slice(start, start + options.batch)
        prompts = [example.prompt for example in chosen[part]]
        return sample(
            network,
            tokenizer,
            prompts,
            heat[part],
            max_tokens=options.max_tokens,
            seed=options.seed + start,
        )

    # One batch a core: threads inside such small operations would mostly wait.
    with (
        ThreadPoolExecutor(options.threads, initializer=torch.set_num_threads, initargs=(1,)) as pool,
        temporary.open("w", encoding="utf-8") as lines,
    ):
        batches = pool.map(answer, range(0, options.n, options.batch))
        answers = (answer for batch in batches for answer in batch)
        for example, warmth, sampled in zip(chosen, heat, answers, strict=True):
            row = {
                "prompt": [{"role": "user", "content": example.prompt}],
                "reference": example.answer,
                "sample": sampled.text,
                "temperature": warmth,
                "tokens": sampled.tokens,
                "ended": sampled.ended,
            }
            lines.write(json.dumps(row) + "\n")
            written += sampled.tokens
    os.replace(temporary, options.out)
    seconds = time.monotonic() - started
    print(f"wrote {options.n} answers, {written} tokens at {written / seconds:.0f} a second")


if __name__ == "__main__":
    main()
