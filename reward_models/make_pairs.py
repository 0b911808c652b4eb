"""Write the pairs that a shipped reward is trained on, for `aisp-local reward train`.

Example: python reward_models/make_pairs.py story-reward --data DIR --samples DIR2 --out pairs
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from aisp_local.reward_kit.pairs import Pair  # noqa: E402
from aisp_local.rewards.text import prompt_text  # noqa: E402
from reward_models.training.pairs import (  # noqa: E402
    MIXES,
    Mix,
    held_out_material,
    training_material,
    training_pairs,
)
from reward_models.training.sources import Story, read_samples  # noqa: E402

HELD_OUT = 1200  # pairs, in about the shares of the training
KINDS = ("own", "damaged_story", "damaged_sample", "kind")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reward", choices=sorted(MIXES))
    parser.add_argument("--data", type=Path, required=True, help="folder of preference/, lm/ and labelled/")
    parser.add_argument("--samples", type=Path, required=True, help="folder of the storyteller's samples.SPLIT.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="folder for train.jsonl.gz and held_out.jsonl.gz")
    parser.add_argument("--pairs", type=int, help="about so many, beside people's preferences (default: the mix's)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def apart(pair: Pair) -> bool:
    """Whether one of people's training pairs is kept for early stopping: a twentieth, by prompt."""
    return hashlib.sha256(prompt_text(pair.prompt).encode()).digest()[2] < 256 / 20


def scaled(mix: Mix, n: int) -> Mix:
    """About n pairs in the mix's shares, beside people's preferences."""
    total = sum(getattr(mix, kind) for kind in KINDS)
    return replace(mix, **{kind: getattr(mix, kind) * n // total for kind in KINDS})


def write(path: Path, pairs: Sequence[Pair]) -> None:
    """JSON lines, gzipped without a time, so that the same pairs are the same bytes."""
    rows = [
        {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected, "source": pair.source}
        for pair in pairs
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode(), mtime=0))
    kinds = Counter(pair.source.split(":")[0] for pair in pairs)
    print(f"{path}: {len(pairs)} pairs ({', '.join(f'{kind} {n}' for kind, n in kinds.most_common())})")


def samples(folder: Path, split: str) -> list[Story]:
    """The storyteller's own answers of a split."""
    return read_samples(folder / f"samples.{split}.jsonl")


def main() -> None:
    options = parse_arguments()
    mix = MIXES[options.reward]
    if options.pairs is not None:
        mix = scaled(mix, options.pairs)
    material = training_material(options.data, samples(options.samples, "train"), mix.half)
    people = material.preferences
    kept = [pair for pair in people if not apart(pair)]
    options.out.mkdir(parents=True, exist_ok=True)
    write(options.out / "train.jsonl.gz", training_pairs(replace(material, preferences=kept), mix, options.seed))

    # Of people's preferences, early stopping sees none of the test.
    held_out = held_out_material(options.data, samples(options.samples, "valid"))
    held_out = replace(held_out, preferences=[pair for pair in people if apart(pair)] if mix.general else [])
    few = replace(scaled(MIXES[options.reward], HELD_OUT - len(held_out.preferences)), general=1)
    write(options.out / "held_out.jsonl.gz", training_pairs(held_out, few, options.seed + 1))


if __name__ == "__main__":
    main()
