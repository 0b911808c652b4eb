"""Reading the data folder: preference pairs, stories behind prompts, labelled texts, own samples."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from aisp_local.reward_kit.pairs import Pair
from aisp_local.rewards.text import prompt_text

HELD_OUT_SHARE = 0.1  # of the labelled sets that come without a split of their own
Half = Literal["a", "b"]
TWITTER = re.compile(r"\bRT\b|@\w+:?|https?://\S+|&\w+;|&#\d+;|[\"“”]")


@dataclass(frozen=True)
class Story:
    """A prompt, the corpus' answer, and (where it was sampled) the storyteller's own."""

    prompt: str
    answer: str
    sample: str = ""
    temperature: float = 0.0


@dataclass(frozen=True)
class Labelled:
    """A text that is unkind or unsafe, or is not; ``context`` is what it answers, where known."""

    text: str
    bad: bool
    source: str
    context: str = ""


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file, gzipped or not."""
    if not path.is_file():
        raise SystemExit(f"error: there is no file {path}; --data must name the data folder.")
    if path.suffix == ".gz":
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def source_name(source: str) -> str:
    """Short name of a preference source; its sub-sources are reported together."""
    for start, name in (
        ("hh-rlhf/helpful", "HH helpful"),
        ("hh-rlhf/harmless", "HH harmless"),
        ("FineGrained", "FineGrainedRLHF"),
        ("DiaSafety", "DiaSafety"),
        ("PandaLM", "PandaLM"),
        ("LLMBar", "LLMBar"),
        ("XSTest", "XSTest"),
        ("HHH", "HHH"),
    ):
        if source.startswith(start):
            return name
    return source


def read_preferences(data: Path, split: str) -> list[Pair]:
    """The general pairs of a split ("train" or "test")."""
    return [
        Pair(
            prompt_text(row["prompt"]),
            row["chosen"].strip(),
            row["rejected"].strip(),
            source_name(row["source"]),
        )
        for row in read_rows(data / "preference" / f"{split}.jsonl.gz")
    ]


def read_stories(data: Path, split: str) -> list[Story]:
    """The stories of a split ("train" or "valid") behind their prompts.

    Rows of the train split whose prompt or opening also occurs in the valid split are left out.
    """

    def rows(name: str) -> list[Story]:
        path = data / "lm" / f"story_chat.{name}.jsonl.gz"
        return [
            Story(prompt_text(row["messages"][:-1]), row["messages"][-1]["content"].strip()) for row in read_rows(path)
        ]

    return without_valid(rows("train"), rows("valid")) if split == "train" else rows(split)


def without_valid(stories: list[Story], valid: Iterable[Story]) -> list[Story]:
    """Leave out the stories whose prompt is one of the valid split's."""
    prompts = {story.prompt for story in valid}
    return [story for story in stories if story.prompt not in prompts]


def read_samples(path: Path) -> list[Story]:
    """The storyteller's own answers beside the corpus' (rows of models/training/sample.py)."""
    return [
        Story(
            prompt_text(row["prompt"]),
            row["reference"].strip(),
            row["sample"].strip(),
            float(row["temperature"]),
        )
        for row in read_rows(path)
        if row["sample"].strip()
    ]


def read_labelled(data: Path, held_out: bool) -> list[Labelled]:
    """The labelled texts of one side of the split. The sets' own splits are used where they exist."""
    folder = data / "labelled"
    texts: list[Labelled] = []

    def add(rows: list[dict[str, Any]], good: set[str], bad: set[str], source: str) -> None:
        for row in rows:
            split = row.get("split") or ("test" if in_held_out(row["text"]) else "train")
            if (split != "train") != held_out or row["label"] not in good | bad:
                continue
            text = " ".join(TWITTER.sub(" ", row["text"]).split()).lstrip("!.,: ")
            if text:
                bad_one = row["label"] in bad
                texts.append(Labelled(text, bad_one, source, row.get("context", "").strip()))

    add(read_rows(folder / "goemotions.jsonl.gz"), {"positive"}, {"negative"}, "GoEmotions")
    add(read_rows(folder / "davidson_hate.jsonl.gz"), {"neither"}, {"hate", "offensive"}, "Davidson")
    add(read_rows(folder / "diasafety.jsonl.gz"), {"Safe"}, {"Unsafe"}, "DiaSafety")
    add(read_rows(folder / "openai_moderation.jsonl.gz"), {"ok"}, {"flagged"}, "moderation")
    add(read_rows(folder / "surge_toxicity.jsonl.gz"), {"Not Toxic"}, {"Toxic"}, "toxicity")
    return texts


def in_held_out(text: str) -> bool:
    """Whether a text without a split of its own is kept for the evaluation."""
    return hashlib.sha256(text.encode()).digest()[0] < 256 * HELD_OUT_SHARE


def half_of(text: str) -> Half:
    """On which side of the split between the two shipped rewards a prompt, or a text without one, lies."""
    return "b" if hashlib.sha256(text.encode()).digest()[1] % 2 else "a"
