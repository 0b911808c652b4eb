"""Measure a reward folder on held-out data and print Markdown tables.

Example: python reward_models/training/evaluate.py --data DIR --samples samples.valid.jsonl
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from aisp_local.reward_kit.pairs import Pair  # noqa: E402
from aisp_local.reward_kit.statistics import Array, auc, share_right, wilson  # noqa: E402
from aisp_local.rewards import OnnxReward  # noqa: E402
from reward_models.training.baselines import BagOfWords, longer_wins  # noqa: E402
from reward_models.training.corrupt import cut_words, sentences  # noqa: E402
from reward_models.training.pairs import (  # noqa: E402
    MIXES,
    Material,
    damaged_pairs,
    general_pairs,
    held_out_material,
    kindness_pairs,
    training_material,
    training_pairs,
)
from reward_models.training.sources import Labelled, Story, read_samples  # noqa: E402

START, END = "<!-- measured -->", "<!-- /measured -->"
KINDNESS_PROMPT = "What do you think?"
_BAG = 8000  # pairs that the bag of words is trained on
SIZES = (10, 20, 40, 80, 120, 160)  # words that the length table keeps


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--samples", type=Path, required=True, help="own answers, valid split")
    parser.add_argument("--train-samples", type=Path, help="own answers that were trained on")
    parser.add_argument("--reward", type=Path, default=ROOT / "reward_models" / "story-reward")
    parser.add_argument("--mix", choices=sorted(MIXES), default="story-reward", help="what it was trained on")
    parser.add_argument("--limit", type=int, default=1000, help="at most so many of each kind")
    parser.add_argument("--card", type=Path, help="put the tables between the marks of this file")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def load_reward(folder: Path) -> OnnxReward:
    """A reward on one core a call: several calls at once wait less than one call spread over the cores."""
    return OnnxReward.load(folder, providers=["CPUExecutionProvider"], threads=1)


def score_rows(reward: OnnxReward, rows: Sequence[tuple[str, Sequence[str]]]) -> Array:
    """Scores [n, k] of n rows (prompt, k responses), on all cores."""
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        found = list(pool.map(lambda row: reward.score(row[0], row[1]), rows))
    return np.asarray(found, np.float64).reshape(len(rows), -1 if rows else 0)


def score_pairs(reward: OnnxReward, pairs: Sequence[Pair]) -> Array:
    """[len(pairs), 2]: scores of the chosen and of the rejected side."""
    return score_rows(reward, [(pair.prompt, (pair.chosen, pair.rejected)) for pair in pairs])


def accuracy_table(pairs: Sequence[Pair], shipped: Array, bag: BagOfWords) -> list[str]:
    """One line a kind and one for all of them."""
    kinds: dict[str, list[int]] = defaultdict(list)
    for i, pair in enumerate(pairs):
        kinds[pair.source].append(i)
    kinds["**all**"] = list(range(len(pairs)))
    lines = [
        "| pairs | n | as shipped (95%) | bag of words | longer wins |",
        "|---|---|---|---|---|",
    ]
    for kind, rows in kinds.items():
        chosen = [pairs[i] for i in rows]
        share = share_right(shipped[rows])
        low, high = wilson(share * len(rows), len(rows))
        words = np.array([[bag.score(p.chosen), bag.score(p.rejected)] for p in chosen])
        lines.append(
            f"| {kind} | {len(rows)} | {share:.3f} ({low:.3f} to {high:.3f}) | "
            f"{share_right(words):.3f} | {longer_wins(chosen):.3f} |"
        )
    return lines


def matched_own(samples: Sequence[Story], n_words: int | None) -> list[Pair]:
    """Corpus and own answers to the same prompt, both cut after n words (None: after the shorter's)."""
    pairs = []
    for s in samples:
        shorter = min(len(s.answer.split()), len(s.sample.split()))
        n = shorter if n_words is None else n_words
        if n <= shorter:
            pairs.append(Pair(s.prompt, cut_words(s.answer, n), cut_words(s.sample, n), "own sample"))
    return pairs


def nonsense_pairs(stories: Sequence[Story], n: int, rng: random.Random) -> list[Pair]:
    """Openings of 5 to 25 words, whole sentences all, against nonsense of as many words.

    The nonsense begins with a capital and ends with a full stop, so that neither gives it away.
    """
    kinds = ("one word", "one phrase", "its words in any order", "words of another story")
    pairs: list[Pair] = []
    for _ in range(20 * n if len(stories) > 1 else 0):
        story, other = rng.sample(stories, 2)
        real = " ".join(sentences(story.answer)[: rng.randint(1, 2)])
        size = len(real.split())
        if not 5 <= size <= 25:
            continue
        kind = kinds[len(pairs) % len(kinds)]
        words, others = ([w.strip('.,!?"') for w in text.split()] for text in (real, other.answer))
        if kind == "its words in any order":
            made = rng.sample(words, size)
        elif kind == "words of another story":
            made = rng.sample(others, min(size, len(others)))
        else:
            period = 1 if kind == "one word" else rng.randint(2, 4)
            start = rng.randrange(max(1, len(others) - period))
            made = [others[start + i % period] for i in range(size)]
        text = " ".join(made)
        if made != words:
            pairs.append(Pair(story.prompt, real, f"{text[:1].upper()}{text[1:]}.", f"nonsense: {kind}"))
        if len(pairs) == n:
            break
    return sorted(pairs, key=lambda pair: pair.source)


def kindness_lines(reward: OnnxReward, labelled: Sequence[Labelled], limit: int) -> list[str]:
    """AUC of clean against unkind texts, by set."""
    lines = ["| texts | clean | unkind | AUC |", "|---|---|---|---|"]
    rng = random.Random(0)
    for source in sorted({text.source for text in labelled}):
        found: list[Array] = []
        for bad in (False, True):
            texts = [t for t in labelled if t.source == source and t.bad == bad]
            texts = rng.sample(texts, min(limit, len(texts)))
            rows = [(t.context or KINDNESS_PROMPT, [t.text]) for t in texts]
            found.append(score_rows(reward, rows)[:, 0])
        good, worse = found
        lines.append(f"| {source} | {len(good)} | {len(worse)} | {auc(good, worse):.3f} |")
    return lines


def length_lines(reward: OnnxReward, samples: Sequence[Story], limit: int) -> list[str]:
    """Mean scores of texts cut at several lengths, and the correlation of score and number of words."""
    shorter = [min(len(s.answer.split()), len(s.sample.split())) for s in samples]
    # Every column shows the same texts; where few are so long, the last columns fall away.
    enough = [size for size in SIZES if sum(n >= size for n in shorter) >= min(20, len(samples))]
    lines: list[str] = []
    if enough:
        long = [s for s, n in zip(samples, shorter, strict=True) if n >= enough[-1]][:limit]
        lines.append(f"| mean score after so many words (n = {len(long)}) | " + " | ".join(map(str, enough)) + " |")
        lines.append("|---" * (len(enough) + 1) + "|")
        for name, texts in (("corpus", [s.answer for s in long]), ("own samples", [s.sample for s in long])):
            rows = [(s.prompt, [cut_words(t, n) for n in enough]) for s, t in zip(long, texts, strict=True)]
            means = score_rows(reward, rows).mean(axis=0)
            lines.append(f"| {name} | " + " | ".join(f"{mean:.2f}" for mean in means) + " |")
        lines.append("")
    whole = samples[:limit]
    lengths = np.array([len(s.sample.split()) for s in whole])
    scores = score_rows(reward, [(s.prompt, [s.sample]) for s in whole])[:, 0]
    lines.append(
        f"Whole own samples: correlation of score and number of words {np.corrcoef(lengths, scores)[0, 1]:.2f} "
        f"(n = {len(whole)}, {lengths.min()} to {lengths.max()} words); "
        f"scores have mean {scores.mean():.2f} and standard deviation {scores.std():.2f}."
    )
    return lines


def report(options: argparse.Namespace) -> str:
    """All tables."""
    reward = load_reward(options.reward)
    samples = read_samples(options.samples)
    material: Material = held_out_material(options.data, samples)
    rng = random.Random(options.seed)
    limit = options.limit

    known = read_samples(options.train_samples) if options.train_samples else []
    mix = MIXES[options.mix]
    drawn = training_pairs(training_material(options.data, known, mix.half), mix, options.seed)
    bag = BagOfWords(drawn[:_BAG])

    def table(pairs: list[Pair]) -> list[str]:
        return accuracy_table(pairs, score_pairs(reward, pairs), bag)

    general = rng.sample(all_general := general_pairs(material), min(limit, len(all_general)))
    lines = ["### People's preferences (preference/test)", "", *table(general)]

    half = max(1, limit // 2)
    damaged = damaged_pairs(material.stories, half, rng, "story")
    damaged += damaged_pairs(samples, half, rng, "sample")
    damaged.sort(key=lambda pair: pair.source)
    lines += ["", "### Damaged stories (valid split)", "", *table(damaged)]

    lines += ["", "### The storyteller's own answers against the corpus (valid split)", ""]
    lines += ["| words kept of both | pairs | AUC | pair accuracy (95%) |", "|---|---|---|---|"]
    for n_words in (40, 80, None):
        pairs = matched_own(samples, n_words)[:limit]
        if not pairs:
            continue
        scores = score_pairs(reward, pairs)
        right = share_right(scores)
        low, high = wilson(right * len(pairs), len(pairs))
        lines.append(
            f"| {n_words or 'as many as the shorter has'} | {len(pairs)} | {auc(scores[:, 0], scores[:, 1]):.3f} | "
            f"{right:.3f} ({low:.3f} to {high:.3f}) |"
        )

    kind = sorted(kindness_pairs(material, half, rng), key=lambda pair: pair.source)
    lines += ["", "### Kind against unkind, equally long", "", *table(kind)]
    lines += ["", "### Labelled texts, as they are", ""]
    lines += kindness_lines(reward, material.labelled, half)
    nonsense = nonsense_pairs(material.stories, half, rng)
    lines += ["", "### Short nonsense against the opening of a story (valid split)", "", *table(nonsense)]
    lines += ["", "### Length", "", *length_lines(reward, samples, limit)]
    return "\n".join(lines)


def main() -> None:
    options = parse_arguments()
    text = report(options)
    print(text)
    if options.card:
        card = options.card.read_text(encoding="utf-8")
        if START not in card or END not in card:
            raise SystemExit(f"error: {options.card} lacks the marks {START} and {END}.")
        before, after = card.split(START)[0], card.split(END)[1]
        options.card.write_text(f"{before}{START}\n\n{text}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
