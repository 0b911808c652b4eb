"""Pairs of a better and a worse answer: which kinds there are, and how many of each are drawn.

The source of a pair says in which sense the first is better.
In every kind made here both answers are about equally long, so that length says nothing.
"""

from __future__ import annotations

import bisect
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from aisp_local.reward_kit.pairs import Pair
from reward_models.training.corrupt import DAMAGES, cut_both, cut_words, sentences
from reward_models.training.sources import (
    Half,
    Labelled,
    Story,
    half_of,
    read_labelled,
    read_preferences,
    read_stories,
)


@dataclass(frozen=True)
class Mix:
    """What a reward is trained on: how many pairs of each kind, and which half of the material they are made of."""

    half: Half
    general: int  # times that people's preferences are taken
    own: int
    damaged_story: int
    damaged_sample: int
    kind: int
    kind_shares: Mapping[str, float]  # of the labelled sets


# The two rewards that are shipped have no pair, no story and no labelled text in common.
MIXES = {
    "story-reward": Mix(
        half="a",
        general=2,
        own=8000,
        damaged_story=6500,
        damaged_sample=3500,
        kind=6500,
        kind_shares={"GoEmotions": 0.35, "Davidson": 0.2, "DiaSafety": 0.25, "moderation": 0.1, "toxicity": 0.1},
    ),
    "story-judge": Mix(
        half="b",
        general=0,
        own=9000,
        damaged_story=8000,
        damaged_sample=4000,
        kind=9000,
        kind_shares={"GoEmotions": 0.3, "Davidson": 0.3, "DiaSafety": 0.2, "moderation": 0.1, "toxicity": 0.1},
    ),
}
IN_STORY = 0.3  # of the kindness pairs: the text stands in the middle of a story


@dataclass(frozen=True)
class Material:
    """Everything of one split that pairs are made of."""

    preferences: Sequence[Pair]
    stories: Sequence[Story]  # of the corpus
    samples: Sequence[Story]  # with the storyteller's own answers; may be empty
    labelled: Sequence[Labelled]


def training_material(data: Path, samples: Sequence[Story], half: Half | None = None) -> Material:
    """The training split of everything, or of one half."""
    stories = read_stories(data, "train")
    kept = {story.prompt for story in stories}  # prompts of the valid split are not among them
    return Material(
        read_preferences(data, "train"),
        [story for story in stories if half in (None, half_of(story.prompt))],
        [s for s in samples if s.prompt in kept and half in (None, half_of(s.prompt))],
        [text for text in read_labelled(data, held_out=False) if half in (None, half_of(text.context or text.text))],
    )


def held_out_material(data: Path, samples: Sequence[Story]) -> Material:
    """What is never trained on."""
    return Material(
        read_preferences(data, "test"),
        read_stories(data, "valid"),
        samples,
        read_labelled(data, held_out=True),
    )


def general_pairs(material: Material) -> list[Pair]:
    """People's preferences, as they are."""
    return list(material.preferences)


def own_pairs(material: Material, n: int, rng: random.Random) -> list[Pair]:
    """The corpus' answer against the storyteller's own, cut to the same number of words."""
    pairs = []
    for story in cycled(material.samples, n, rng):
        chosen, rejected = cut_both(story.answer, story.sample, rng)
        pairs.append(Pair(story.prompt, chosen, rejected, "own sample"))
    return pairs


def damaged_pairs(stories: Sequence[Story], n: int, rng: random.Random, of: str) -> list[Pair]:
    """Each kind of damage in turn. ``of`` says whose stories: the corpus' or the storyteller's."""
    texts = [(s.prompt, s.answer if of == "story" else s.sample) for s in stories]
    pairs: list[Pair] = []
    names = list(DAMAGES)
    tries = 0
    while texts and len(pairs) < n and tries < 20 * n:
        kind = names[tries % len(names)]
        tries += 1
        (prompt, text), (other_prompt, other) = rng.choice(texts), rng.choice(texts)
        if prompt == other_prompt or not text or not other:
            continue
        made = DAMAGES[kind](prompt, text, other, rng)
        if made:
            pairs.append(Pair(prompt, *made, source=f"{of}: {kind}"))
    return pairs


class LengthMatcher:
    """Finds a text of about the same number of words among many."""

    def __init__(self, texts: Sequence[Labelled]) -> None:
        self.texts = sorted(texts, key=lambda t: len(t.text.split()))
        self.lengths = [len(t.text.split()) for t in self.texts]

    def match(self, n_words: int, rng: random.Random) -> Labelled | None:
        """A text within 10% (at least one word) of n_words, or None."""
        slack = max(1, n_words // 10)
        low = bisect.bisect_left(self.lengths, n_words - slack)
        high = bisect.bisect_right(self.lengths, n_words + slack)
        return self.texts[rng.randrange(low, high)] if high > low else None


def kindness_pairs(
    material: Material, n: int, rng: random.Random, shares: Mapping[str, float] = MIXES["story-reward"].kind_shares
) -> list[Pair]:
    """A kind or clean text against an unkind or unsafe one of the same source and length."""
    good: dict[str, list[Labelled]] = defaultdict(list)
    bad: dict[str, list[Labelled]] = defaultdict(list)
    for text in material.labelled:
        (bad if text.bad else good)[text.source].append(text)
    matchers = {source: LengthMatcher(texts) for source, texts in good.items()}
    sources = [source for source in shares if source in good and source in bad]
    pairs: list[Pair] = []
    while sources and len(pairs) < n:
        source = rng.choices(sources, [shares[s] for s in sources])[0]
        worse = rng.choice(bad[source])
        better = matchers[source].match(len(worse.text.split()), rng)
        if not better:
            continue
        story = rng.choice(material.stories)
        prompt = story.prompt
        if worse.context and better.context:
            prompt = rng.choice((worse, better)).context
        n_words = min(len(better.text.split()), len(worse.text.split()), 60)
        chosen, rejected = cut_words(better.text, n_words), cut_words(worse.text, n_words)
        if rng.random() < IN_STORY:
            parts = sentences(story.answer)[: rng.randint(3, 5)]
            place = rng.randint(1, len(parts))
            chosen, rejected = (" ".join([*parts[:place], text, *parts[place:]]) for text in (chosen, rejected))
            pairs.append(Pair(story.prompt, chosen, rejected, "kind in story"))
        else:
            pairs.append(Pair(prompt, chosen, rejected, f"kind: {source}"))
    return pairs


def cycled(stories: Sequence[Story], n: int, rng: random.Random) -> list[Story]:
    """n of the stories, in random order, each about equally often."""
    out: list[Story] = []
    while stories and len(out) < n:
        out += rng.sample(stories, min(len(stories), n - len(out)))
    return out


def training_pairs(material: Material, mix: Mix, seed: int) -> list[Pair]:
    """The pairs of a mix (fewer where material runs out), shuffled."""
    rng = random.Random(seed)
    pairs = general_pairs(material) * mix.general
    pairs += damaged_pairs(material.stories, mix.damaged_story, rng, "story")
    pairs += kindness_pairs(material, mix.kind, rng, mix.kind_shares)
    if material.samples:
        pairs += own_pairs(material, mix.own, rng)
        pairs += damaged_pairs(material.samples, mix.damaged_sample, rng, "sample")
    rng.shuffle(pairs)
    return pairs
