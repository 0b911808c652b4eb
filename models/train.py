"""Train the shipped storyteller from scratch and write it as a GGUF file.

Example: python models/train.py --data DIR --minutes 55 --out models/storyteller
"""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
if find_spec("torch") is None:
    raise SystemExit("this needs torch, which is not installed: pip install '.[train]'")

from tokenizers import Tokenizer  # noqa: E402
from training.batches import encode  # noqa: E402
from training.corpus import read_chat, read_stories  # noqa: E402
from training.export import write_gguf  # noqa: E402
from training.loop import Plan, train  # noqa: E402
from training.network import Shape  # noqa: E402
from training.tokenizer import train_tokenizer  # noqa: E402

FULL = Shape(vocabulary=3072, width=192, layers=6, heads=6, kv_heads=2, feed_forward=544)
SMOKE = Shape(vocabulary=512, width=64, layers=2, heads=2, kv_heads=1, feed_forward=96)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder that holds lm/")
    parser.add_argument("--out", type=Path, default=Path("models/storyteller"))
    parser.add_argument("--work", type=Path, help="folder for checkpoints (default: OUT/work)")
    parser.add_argument("--minutes", type=float, default=55.0, help="time limit of the training")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--smoke", action="store_true", help="a tiny run through every step")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    if not (options.data / "lm").is_dir():
        raise SystemExit(f"error: {options.data} holds no folder lm; --data must name the data.")
    work = options.work or options.out / "work"
    for folder in (options.out, work):
        folder.mkdir(parents=True, exist_ok=True)

    stories = read_stories(options.data, "train")
    chat = read_chat(options.data, "valid")[: 16 if options.smoke else 160]
    shape, plan = FULL, Plan(minutes=options.minutes, seed=options.seed)
    if options.smoke:
        stories, shape = stories[:400], SMOKE
        plan = Plan(max_steps=12, batch_tokens=1024, limit=128, report_steps=4)

    saved_tokenizer = work / "tokenizer.json"
    if options.resume and saved_tokenizer.is_file():
        tokenizer = Tokenizer.from_file(str(saved_tokenizer))
    else:
        tokenizer = train_tokenizer(stories, shape.vocabulary)
        tokenizer.save(str(saved_tokenizer))
    network = train(
        shape,
        tokenizer,
        stories,
        encode(tokenizer, chat, plan.limit),
        plan,
        work,
        device=options.device,
        resume=options.resume,
    )
    path = options.out / f"{options.out.resolve().name}.gguf"
    write_gguf(path, network, tokenizer, "aisp-local storyteller")
    print(f"wrote {path} ({path.stat().st_size} bytes)")


if __name__ == "__main__":
    main()
