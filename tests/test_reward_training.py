"""What the shipped rewards are trained on: the damage, the mixes, the files; and how their cards are measured."""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from onnx_files import write_reward

from aisp_local.reward_kit.pairs import Pair, read_pairs

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # last, so that aisp_local stays the installed one

from reward_models.training.corrupt import DAMAGES, MAX_WORDS  # noqa: E402
from reward_models.training.evaluate import length_lines, load_reward, nonsense_pairs, score_pairs  # noqa: E402
from reward_models.training.pairs import MIXES  # noqa: E402
from reward_models.training.sources import Story, half_of  # noqa: E402

PROMPT = "Write a short story that uses the words garden, kite and river."
STORY = (
    "Once upon a time, there was a girl named Lily. She had a red kite and loved the garden behind her house. One day "
    "Lily took the kite to the river, and her friend Ben came with her. He held the string while she ran. The wind "
    "blew hard, and the kite flew over the trees. Then it fell into the water. Lily was sad, but Ben had an idea. He "
    "found a long stick and pulled the kite out. She thanked him, and they dried it in the sun. In the evening Lily "
    "and Ben went home through the garden. They were tired and happy, and her mother gave them warm milk. After that "
    "day Lily never went to the river without Ben, and he never laughed at her kite again."
)
OTHER = (
    "There was an old bear who lived in a cave. Every morning the bear walked to the hill and looked for honey. He met "
    "a small bee, and the bee was angry. The bear said that he was sorry. The bee showed him a tree with much honey. "
    "They shared it and became friends. The bear slept well that night. In winter the bee slept in his cave."
)


@pytest.mark.parametrize("kind", sorted(DAMAGES))
def test_damage_keeps_the_length_and_changes_the_text(kind: str) -> None:
    made = [DAMAGES[kind](PROMPT, STORY, OTHER, random.Random(seed)) for seed in range(60)]
    pairs = [pair for pair in made if pair]
    assert len(pairs) > 10
    assert made == [DAMAGES[kind](PROMPT, STORY, OTHER, random.Random(seed)) for seed in range(60)]
    for better, worse in pairs:
        assert better != worse
        assert better.split()[0] == "Once", "the better side is the story itself"
        long, short = max(map(len, (better.split(), worse.split()))), min(map(len, (better.split(), worse.split())))
        # A story cut in the middle of a sentence has by its nature another length, as often more as less.
        assert long <= MAX_WORDS and (short == long or kind in ("cut", "shuffled", "lost name"))
    assert len({better for better, _ in pairs}) > 1 or kind == "lost words"


def test_loops_repeat_and_cuts_do_not_end() -> None:
    for seed in range(30):
        looped = DAMAGES["phrase loop"](PROMPT, STORY, OTHER, random.Random(seed))
        if looped and len(looped[1].split()) > 20:
            words = looped[1].split()
            assert any(words[-k:] == words[-2 * k : -k] for k in range(1, 7))
        cut = DAMAGES["cut"](PROMPT, STORY, OTHER, random.Random(seed))
        assert cut is None or (cut[0][-1] in ".!?" and cut[1][-1] not in ".!?")


def test_short_nonsense_is_as_long_as_the_opening_and_ends_like_it() -> None:
    stories = [Story(PROMPT, STORY), Story("Tell me a story about a bear.", OTHER)]
    pairs = nonsense_pairs(stories, 40, random.Random(0))
    assert pairs == nonsense_pairs(stories, 40, random.Random(0))
    assert len(pairs) == 40 and len({pair.source for pair in pairs}) == 4
    for pair in pairs:
        real, made = pair.chosen.split(), pair.rejected.split()
        assert 5 <= len(real) == len(made) <= 25
        assert STORY.startswith(pair.chosen) or OTHER.startswith(pair.chosen)
        assert (
            pair.chosen[-1] == pair.rejected[-1] == "." and pair.rejected[0].isupper() and pair.chosen != pair.rejected
        )
        if pair.source == "nonsense: one word":
            assert len({word.strip(".").lower() for word in made}) == 1
    assert nonsense_pairs(stories[:1], 5, random.Random(0)) == []


def test_evaluation_scores_on_several_threads_as_one_by_one(tmp_path: Path) -> None:
    reward = load_reward(write_reward(tmp_path / "tiny"))
    pairs = [Pair("tell a story", "good fox " * n, "the bad " * n, "any") for n in range(1, 30)]
    expected = [[reward.score(p.prompt, [text])[0] for text in (p.chosen, p.rejected)] for p in pairs]
    np.testing.assert_allclose(score_pairs(reward, pairs), expected, atol=1e-5)
    assert len({row[0] for row in expected}) > 5, "the rows must differ for their order to be tested"
    assert score_pairs(reward, []).shape[0] == 0


def test_length_table_has_only_the_lengths_that_enough_answers_reach(tmp_path: Path) -> None:
    wide = {"kind": "pair", "template": None, "max_length": 128, "truncation": "prompt-left", "bos": "tokenizer"}
    reward = load_reward(write_reward(tmp_path / "tiny", input=wide))
    own = ("bad " * 20 + "fox good the story " * 20).split()  # their mix changes with the length
    samples = [Story("tell a story", "good " * n, " ".join(own[: n + 5])) for n in range(30, 55)]  # 15 reach 40 words
    lines = length_lines(reward, samples, limit=22)
    assert lines[0] == "| mean score after so many words (n = 22) | 10 | 20 |"
    assert "(n = 22, 35 to 56 words)" in lines[-1]
    short = length_lines(reward, [Story("tell", "good", "bad fox"), Story("tell", "bad", "the good story")], limit=5)
    assert len(short) == 1 and "(n = 2, 2 to 3 words)" in short[0]


def write_rows(path: Path, rows: Iterable[object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def write_data(folder: Path) -> Path:
    """A data folder in the layout of the real one; returns the file of the storyteller's own answers."""
    animals = ["fox", "dog", "cat", "owl", "hen", "cow", "pig", "ant"]
    prompts = {split: [f"Tell me a story about a {a} and {split}." for a in animals] for split in ("train", "valid")}
    for split, texts in prompts.items():
        rows = [
            {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": story}]}
            for text in texts
            for story in (STORY, OTHER)
        ]
        write_rows(folder / "lm" / f"story_chat.{split}.jsonl.gz", rows)
    for split in ("train", "test"):
        rows = [
            {
                "prompt": [{"role": "user", "content": f"What does a {animal} eat?"}],
                "chosen": f"A {animal} eats what it finds, and it drinks water.",
                "rejected": "Who knows.",
                "source": source,
                "license": "MIT",
            }
            for animal in animals
            for source in ("hh-rlhf/helpful-base", "PandaLM")
        ]
        write_rows(folder / "preference" / f"{split}.jsonl.gz", rows)
    labels = {
        "goemotions": ("positive", "negative"),
        "davidson_hate": ("neither", "offensive"),
        "diasafety": ("Safe", "Unsafe"),
        "openai_moderation": ("ok", "flagged"),
        "surge_toxicity": ("Not Toxic", "Toxic"),
    }
    for name, (good, bad) in labels.items():
        rows = [
            {"text": f"{text} {animal} number {i}", "label": label}
            for i, animal in enumerate(animals * 4)
            for text, label in (("What a lovely little", good), ("Go away you stupid", bad))
        ]
        write_rows(folder / "labelled" / f"{name}.jsonl.gz", rows)
    samples = folder / "samples.jsonl"
    own = [
        {
            "prompt": [{"role": "user", "content": prompt}],
            "reference": STORY,
            "sample": OTHER,
            "temperature": 0.5,
        }
        for prompt in prompts["train"]
    ]
    samples.write_text("".join(json.dumps(row) + "\n" for row in own), encoding="utf-8")
    return samples


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the pairs of both rewards."""
    folder = tmp_path_factory.mktemp("pairs")
    samples = write_data(folder / "data")
    for split in ("train", "valid"):
        (folder / "data" / f"samples.{split}.jsonl").write_bytes(samples.read_bytes())
    for name in MIXES:
        command = [sys.executable, ROOT / "reward_models" / "make_pairs.py", name, "--data", folder / "data"]
        command += ["--samples", folder / "data", "--out", folder / name, "--pairs", 400]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert "pairs (" in done.stdout
    return folder


def test_pairs_of_the_shipped_rewards_are_of_every_kind(made: Path) -> None:
    for name, mix in MIXES.items():
        pairs = read_pairs(made / name / "train.jsonl.gz")
        kinds = {pair.source.split(":")[0] for pair in pairs}
        assert {"own sample", "story", "sample", "kind"} <= kinds
        assert ("PandaLM" in kinds) == bool(mix.general)
        everything = mix.own + mix.damaged_story + mix.damaged_sample + mix.kind
        assert sum(pair.source == "own sample" for pair in pairs) == 400 * mix.own // everything
        assert read_pairs(made / name / "held_out.jsonl.gz")


def test_the_two_rewards_share_no_story_and_no_labelled_text(made: Path) -> None:
    sides = {}
    for name, mix in MIXES.items():
        pairs = read_pairs(made / name / "train.jsonl.gz")
        for pair in pairs:
            if pair.source == "own sample" or pair.source.startswith("story: "):
                assert half_of(str(pair.prompt)) == mix.half
        sides[name] = {
            text for pair in pairs if pair.source.startswith("kind: ") for text in (pair.chosen, pair.rejected)
        }
    assert all(sides.values()) and not set.intersection(*sides.values())


def test_the_same_pairs_are_the_same_bytes(made: Path, tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "reward_models" / "make_pairs.py", "story-judge", "--data", made / "data"]
    command += ["--samples", made / "data", "--out", tmp_path, "--pairs", 400]
    subprocess.run([str(part) for part in command], check=True, capture_output=True, timeout=300)
    for name in ("train.jsonl.gz", "held_out.jsonl.gz"):
        assert (tmp_path / name).read_bytes() == (made / "story-judge" / name).read_bytes()


def test_rows_of_the_cheerful_rewards(tmp_path: Path) -> None:
    rows = [
        {"text": f"{split} {label} é", "label": label, "split": split}
        for split in ("train", "dev", "test")
        for label in ("positive", "neutral", "negative", "mixed")
    ]
    write_rows(tmp_path / "labelled" / "goemotions.jsonl.gz", rows)
    texts = {}
    for name in ("cheer", "cheer-judge"):
        command = [sys.executable, str(ROOT / "reward_models" / "make_rows.py"), name, "--data", str(tmp_path)]
        subprocess.run([*command, "--out", str(tmp_path / name)], check=True, capture_output=True, timeout=60)
        texts[name] = [json.loads(line)["text"] for line in (tmp_path / name).read_text(encoding="utf-8").splitlines()]
    assert texts["cheer"] == ["train positive é", "train negative é"]
    others = [f"{split} {label} é" for split in ("dev", "test") for label in ("positive", "negative")]
    assert texts["cheer-judge"] == others
    nowhere = subprocess.run(
        [*command[:-1], str(tmp_path / "labelled"), "--out", "rows"], capture_output=True, text=True, timeout=60
    )
    assert nowhere.returncode == 1 and "--data must name the data" in nowhere.stderr
