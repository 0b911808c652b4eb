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

MIN_WORDS, MAX_WORDS = 12, 170  # of a text that is cut, as a token limit would cut it
PRONOUNS = {"he": "she", "she": "he", "his": "her", "her": "his", "him": "her", "He": "She", "She": "He"}

Damage = Callable[[str, str, str, random.Random], tuple[str, str] | None]
"""(prompt, story, a story to another prompt, random numbers) -> (better, worse) or None."""


def sentences(text: str) -> list[str]:
    """The sentences of a text, in order, without the space around them."""
    return [part.strip() for part in SENTENCE.findall(text) if part.strip()]


def cut_words(text: str, n: int) -> str:
    """The first n words, as a token limit would leave them."""
    parts = re.findall(r"\S+\s*", text)
    return "".join(parts[:n]).strip()


def any_length(rng: random.Random, most: int = MAX_WORDS) -> int:
    """A number of words, short ones as often as long ones (uniform in its logarithm)."""
    return round(MIN_WORDS * (max(most, MIN_WORDS) / MIN_WORDS) ** rng.random())


def cut_both(first: str, second: str, rng: random.Random) -> tuple[str, str]:
    """Cut two texts to the same number of words, at most that of the shorter.

    Two texts of nearly the same length are sometimes left whole, so that endings are learned too.
    """
    a, b = len(first.split()), len(second.split())
    if max(a, b) <= 1.2 * MAX_WORDS and min(a, b) >= 0.8 * max(a, b) and rng.random() < 0.5:
        return first, second
    n = min(a, b, any_length(rng))
    return cut_words(first, n), cut_words(second, n)


def same_length(first: str, second: str, most: int = MAX_WORDS) -> tuple[str, str] | None:
    """Both cut to the shorter one's number of words, at most `most`; None if they are then the same."""
    n = min(len(first.split()), len(second.split()), most)
    better, worse = cut_words(first, n), cut_words(second, n)
    return (better, worse) if better != worse else None


def shuffled(prompt: str, story: str, other: str, rng: random.Random) -> tuple[str, str] | None:
    """Sentences in another order."""
    parts = sentences(story)[: rng.randint(4, 14)]
    if len(parts) < 4:
        return None
    order = rng.sample(parts, len(parts))
    return (" ".join(parts), " ".join(order)) if order != parts else None


def cut(prompt: str, story: str, other: str, rng: random.Random) -> tuple[str, str] | None:
    """The end cut in the middle of a sentence; as often a little longer as a little shorter."""
    parts = sentences(story)
    if len(parts) < 5:
        return None
    k = rng.randint(3, min(14, len(parts) - 1))
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
    parts = sentences(story)[: rng.randint(5, 18)]
    if len(parts) < 5:
        return None
    start = rng.randint(1, len(parts) - 3)
    period = rng.choice((1, 1, 2))
    worse = list(parts)
    for i in range(start + period, len(parts)):
        worse[i] = worse[i - period]
    return same_length(" ".join(parts), " ".join(worse))


def phrase_loop(prompt: str, story: str, other: str, rng: random.Random) -> tuple[str, str] | None:
    """From some word on the same few words again and again."""
    words = story.split()[: any_length(rng)]
    if len(words) < 8:
        return None
    period = rng.randint(1, 6)
    start = rng.randint(2, max(2, len(words) - 3 * period))
    worse = [*words[:start]]
    while len(worse) < len(words):
        worse.append(worse[-period] if len(worse) >= period else worse[-1])
    return same_length(" ".join(words), " ".join(worse))


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
    return same_length(" ".join(parts), worse, rng.randint(50, MAX_WORDS))


def lost_name(prompt: str, story: str, other: str, rng: random.Random) -> tuple[str, str] | None:
    """The child has another name in every second place."""
    better = " ".join(sentences(story)[: rng.randint(4, 14)])
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
    return same_length(" ".join(parts), " ".join(worse))


def pronouns(prompt: str, story: str, other: str, rng: random.Random) -> tuple[str, str] | None:
    """He is she in every second place."""
    words = story.split()[: any_length(rng)]
    places = [i for i, word in enumerate(words) if word in PRONOUNS]
    if len(places) < 3:
        return None
    worse = list(words)
    for i in rng.sample(places, (len(places) + 1) // 2):
        worse[i] = PRONOUNS[worse[i]]
    return " ".join(words), " ".join(worse)


def scrambled(prompt: str, story: str, other: str, rng: random.Random) -> tuple[str, str] | None:
    """Words that do not exist: the letters of some are mixed, or two are run into one another."""
    words = story.split()[: any_length(rng)]
    long = [i for i, word in enumerate(words) if len(word) > 4]
    if len(long) < 2:
        return None
    worse = list(words)
    for i in rng.sample(long, max(1, round(len(long) * rng.uniform(0.1, 0.5)))):
        if rng.random() < 0.5:
            worse[i] = words[i][:2] + "".join(rng.sample(words[i][2:], len(words[i]) - 2))
        else:
            worse[i] = words[i][: len(words[i]) // 2] + words[rng.choice(long)][2:]
    return same_length(" ".join(words), " ".join(worse))


def doubled(prompt: str, story: str, other: str, rng: random.Random) -> tuple[str, str] | None:
    """Some words are said twice in a row."""
    words = story.split()[: any_length(rng)]
    share = rng.uniform(0.05, 0.3)
    worse = [copy for word in words for copy in ([word, word] if rng.random() < share else [word])]
    return same_length(" ".join(words), " ".join(worse))


def word_salad(prompt: str, story: str, other: str, rng: random.Random) -> tuple[str, str] | None:
    """A few words that make no sentence: one word repeated, words in any order, words of another story."""
    words = story.split()[: rng.choice((rng.randint(2, 8), rng.randint(5, 25), any_length(rng)))]
    if len(words) < 2:
        return None
    # The best that can be said in so few words is a whole sentence, where there is one.
    whole = cut_words(" ".join(words), max((i + 1 for i, w in enumerate(words) if w[-1] in '.!?"'), default=len(words)))
    n = len(whole.split())
    kind = rng.choice(("repeat", "order", "foreign"))
    if kind == "repeat":
        worse = [rng.choice(story.split())] * n
    elif kind == "order":
        worse = rng.sample(whole.split(), n)
    else:
        worse = rng.choices(other.split(), k=n)
    return same_length(whole, " ".join(worse))


DAMAGES: dict[str, Damage] = {
    "shuffled": shuffled,
    "cut": cut,
    "loop": loop,
    "wrong story": wrong_story,
    "drift": drift,
    "lost name": lost_name,
    "lost words": lost_words,
    "phrase loop": phrase_loop,
    "pronouns": pronouns,
    "scrambled": scrambled,
    "doubled": doubled,
    "word salad": word_salad,
}
