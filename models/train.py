"""Train a small language model from scratch and write it as a GGUF file: the storyteller, or the talker.

Example: python models/train.py --data DIR --minutes 55 --out models/storyteller
         python models/train.py --data DIR --corpus dialogs --minutes 25 --out models/talker
"""

from __future__ import annotations

import argparse
import random
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
if find_spec("torch") is None:
    raise SystemExit("this needs torch, which is not installed: pip install '.[train]'")

from tokenizers import Tokenizer  # noqa: E402
from training.batches import Maker, encode  # noqa: E402
from training.corpus import PromptMaker, read_chat, read_stories  # noqa: E402
from training.dialogs import DialogMaker, read_dialogs  # noqa: E402
from training.export import write_gguf  # noqa: E402
from training.loop import Plan, train  # noqa: E402
from training.network import Shape  # noqa: E402
from training.tokenizer import train_tokenizer  # noqa: E402

SHAPES = {
    "stories": Shape(vocabulary=3072, width=192, layers=6, heads=6, kv_heads=2, feed_forward=544),
    "dialogs": Shape(vocabulary=3072, width=160, layers=5, heads=5, kv_heads=1, feed_forward=448),
}
ABOUT = {
    "stories": ("A very small storyteller, trained from scratch on TinyStories", "cdla-sharing-1.0"),
    "dialogs": ("A very small talker, trained from scratch on task dialogues and small talk", "cc-by-sa-4.0"),
}
SMOKE = Shape(vocabulary=512, width=64, layers=2, heads=2, kv_heads=1, feed_forward=96)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder that holds lm/")
    parser.add_argument("--corpus", choices=sorted(SHAPES), default="stories")
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

    shape, plan = SHAPES[options.corpus], Plan(minutes=options.minutes, seed=options.seed)
    size, held_out = None, 160
    if options.smoke:
        shape, size, held_out = SMOKE, 400, 16
        plan = Plan(max_steps=12, batch_tokens=1024, limit=128, report_steps=4)
    corpus: list[Any]
    maker: Maker[Any]
    if options.corpus == "stories":
        corpus = texts = read_stories(options.data, "train")[:size]
        maker, validation = PromptMaker(corpus), read_chat(options.data, "valid")[:held_out]
    else:
        corpus, maker = read_dialogs(options.data, "train")[:size], DialogMaker()
        texts = [content for dialog in corpus for _, content in dialog]
        rng = random.Random(options.seed)
        validation = [maker.make(dialog, rng) for dialog in read_dialogs(options.data, "valid")[:held_out]]

    saved_tokenizer = work / "tokenizer.json"
    if options.resume and saved_tokenizer.is_file():
        tokenizer = Tokenizer.from_file(str(saved_tokenizer))
    else:
        tokenizer = train_tokenizer(texts, shape.vocabulary)
        tokenizer.save(str(saved_tokenizer))
    network = train(
        shape,
        tokenizer,
        corpus,
        maker,
        encode(tokenizer, validation, plan.limit),
        plan,
        work,
        device=options.device,
        resume=options.resume,
    )
    path = options.out / f"{options.out.resolve().name}.gguf"
    description, licence = ABOUT[options.corpus]
    write_gguf(path, network, tokenizer, name=f"aisp-local {path.stem}", description=description, licence=licence)
    print(f"wrote {path} ({path.stat().st_size} bytes)")


if __name__ == "__main__":
    main()
