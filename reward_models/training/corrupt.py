"""Damage done to stories, one function a kind.

Each takes a story and returns (better, worse), two texts of about the same length which differ in one
defect, or None where the story does not allow it. Small story models make these very mistakes.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable

SENTENCE = re.compile(r".+?(?:[.!?]+[\"']?(?=\s|$)|$)", re.DOTALL)
NAME = re.compile(r"(?<=[a-z,] )[A-Z][a-z]{2,}\b")
REQUESTED = re.compile(r"words? ((?:[a-z]+, )*[a-z]+(?:,? and [a-z]+)?)")
OTHER_NAMES = ("Lily", "Tim", "Mia", "Ben", "Sara", "Max", "Anna", "Tom", "Lucy", "Jack", "Emma", "Leo")

MIN_WORDS, MAX_WORDS = 30, 80  # of a text that is cut, as a token limit would cut it

Damage = Callable[[str, str, str, random.Random], tuple[str, str] | None]
"""(prompt, story, a story to another prompt, random numbers) -> (better, worse) or None."""


def sentences(text: str) -> list[str]:
    """The sentences of a text, in order, without the space around them."""
    return [part.strip() for part in SENTENCE.findall(text) if part.strip()]


def cut_words(text: str, n: int) -> str:
    """The first n words, as a token limit would leave them."""
    parts = re.findall(r"\S+\s*", text)
    return "".join(parts[:n]).strip()


def cut_both(first: str, second: str, rng: random.Random) -> tuple[str, str]:
    """Cut two texts to the same number of words, at most that of the shorter.

    Two texts of nearly the same length are sometimes left whole, so that endings are learned too.
    """
    a, b = len(first.split()), len(second.split())
    if max(a, b) <= 1.2 * MAX_WORDS and min(a, b) >= 0.8 * max(a, b) and rng.random() < 0.5:
        return first, second
    n = min(a, b, rng.randint(MIN_WORDS, MAX_WORDS))
    return cut_words(first, n), cut_words(second, n)


def shuffled(prompt: str, story: str, other: str, rng: random.Random) -> tuple[str, str] | None:
    """Sentences in another order."""
    parts = sentences(story)[: rng.randint(4, 9)]
    if len(parts) < 4:
        return None
    order = rng.sample(parts, len(parts))
    return (" ".join(parts), " ".join(order)) if order != parts else None


def cut(prompt: str, story: str, other: str, rng: random.Random) -> tuple[str, str] | None:
    """The end cut in the middle of a sentence; as often a little longer as a little shorter."""
    parts = sentences(story)
    if len(parts) < 5:
        return None
    k = rng.randint(3, min(8, len(parts) - 1))
    whole = " ".join(parts[:k])
    source = parts[k] if rng.random() < 0.5 else parts[k - 1]
    words = source.split()
    if len(words) < 4:
        return None
    half = " ".join(words[: rng.randint(2, len(words) - 2)])
    kept = parts[:k] if source is parts[k] else parts[: k - 1]
    return whole, " ".join([*kept, half])


def loop(prompt: str, story: str, other: str, rng: random.Random) -> tuple[str, str] | None:
    """One or two sentences said over and over instead of going on."""
    parts = sentences(story)[: rng.randint(5, 10)]
    if len(parts) < 5:
        return None
    start = rng.randint(1, len(parts) - 3)
    period = rng.choice((1, 1, 2))
    worse = list(parts)
    for i in range(start + period, len(parts)):
        worse[i] = worse[i - period]
    n = min(len(" ".join(parts).split()), len(" ".join(worse).split()), MAX_WORDS)
    return cut_words(" ".join(parts), n), cut_words(" ".join(worse), n)


def wrong_story(prompt: str, story: str, other: str, rng: random.Random) -> tuple[str, str] | None:
    """A good story, but the answer to another prompt."""
    return cut_both(story, other, rng)


def drift(prompt: str, story: str, other: str, rng: random.Random) -> tuple[str, str] | None:
    """In the middle the story becomes another one."""
    parts, others = sentences(story), sentences(other)
    if len(parts) < 6 or len(others) < 6:
        return None
    k = rng.randint(2, min(4, len(parts) - 3))
    worse = " ".join(parts[:k] + others[rng.randint(1, len(others) - 3) :])
    better = " ".join(parts)
    n = min(len(better.split()), len(worse.split()), rng.randint(50, MAX_WORDS))
    return cut_words(better, n), cut_words(worse, n)


def lost_name(prompt: str, story: str, other: str, rng: random.Random) -> tuple[str, str] | None:
    """The child has another name in every second place."""
    better = " ".join(sentences(story)[: rng.randint(4, 9)])
    names = [name for name, count in Counter(NAME.findall(better)).items() if count > 1]
    if not names:
        return None
    name = rng.choice(names)
    places = [m.start() for m in re.finditer(rf"\b{name}\b", better)][1:]
    if not places:
        return None
    stranger = rng.choice([n for n in OTHER_NAMES if n not in better])
    worse = better
    for place in sorted(rng.sample(places, (len(places) + 1) // 2), reverse=True):
        worse = worse[:place] + stranger + worse[place + len(name) :]
    return better, worse


def lost_words(prompt: str, story: str, other: str, rng: random.Random) -> tuple[str, str] | None:
    """The sentences that hold a requested word give way to others of about their length."""
    match = REQUESTED.search(prompt)
    if not match:
        return None
    words = re.findall(r"[a-z]+", match[1].replace(" and ", ", "))
    parts = sentences(story)
    present = [w for w in words if any(w in part.lower() for part in parts)]
    if not present:
        return None
    gone = rng.sample(present, rng.randint(1, len(present)))
    if 3 * sum(any(w in part.lower() for w in gone) for part in parts) > len(parts):
        return None  # so much would go that the story became another one
    spare = [s for s in sentences(other) if not any(w in s.lower() for w in words)]
    worse = []
    for part in parts:
        if any(word in part.lower() for word in gone):
            if not spare:
                return None
            part = min(spare, key=lambda s: abs(len(s) - len(part)))
            spare.remove(part)
        worse.append(part)
    n = min(len(" ".join(parts).split()), len(" ".join(worse).split()), MAX_WORDS)
    better_text, worse_text = cut_words(" ".join(parts), n), cut_words(" ".join(worse), n)
    return (better_text, worse_text) if better_text != worse_text else None


DAMAGES: dict[str, Damage] = {
    "shuffled": shuffled,
    "cut": cut,
    "loop": loop,
    "wrong story": wrong_story,
    "drift": drift,
    "lost name": lost_name,
    "lost words": lost_words,
}
