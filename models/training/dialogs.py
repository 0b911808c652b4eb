"""Dialogues as examples: the opening is the prompt, everything after it is learnt."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from training.corpus import Example, read_rows

Dialog = Sequence[tuple[str, str]]
"""Turns of (role, content); the first is the user's, the roles alternate."""


def read_dialogs(data: Path, split: str) -> list[Dialog]:
    """The dialogues of a split ("train" or "valid")."""
    rows = read_rows(data / "lm" / f"dialogs.{split}.jsonl.gz")
    return [[(turn["role"], turn["content"]) for turn in row["messages"]] for row in rows]


class DialogMaker:
    """Begins a dialogue at one of the user's turns, half of the time the first; the same seed gives the same ones."""

    def make(self, dialog: Dialog, rng: random.Random) -> Example:
        starts = [i for i, (role, _) in enumerate(dialog[:-1]) if role == "user"]
        start = starts[0] if rng.random() < 0.5 else rng.choice(starts)
        rest = dialog[start + 1 :]
        answer = rest[0][1] + "".join(f"<|im_end|>\n<|im_start|>{role}\n{content}" for role, content in rest[1:])
        return Example(dialog[start][1], answer)
