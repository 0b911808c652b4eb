"""Stories, and prompts made up for them.

Each story is used once an epoch, behind a prompt drawn afresh: "tell me a story about X",
"use these words", or "finish this story". Names of children are sometimes exchanged, so that
the network copies a name from the prompt rather than remembering whose story it is.
"""

from __future__ import annotations

import gzip
import json
import random
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

GIRLS = re.findall(
    r"\w+",
    "Lily Sara Anna Mia Lucy Lila Amy Molly Jane Emma Ella Sally Mary Jenny Susie Tina Kitty "
    "Mandy Emily Sophie Zoe Lisa Nina Bella Katie Julia Maya Sarah Polly Annie",
)
BOYS = re.findall(
    r"\w+",
    "Tim Tom Ben Max Timmy Jack Sam John Tommy Bob Billy Jimmy Joe Johnny Bobby Peter Jim Fred "
    "Jake Charlie Danny Leo Harry Mike Andy David George Dave Freddy Ricky",
)

ABOUT = [
    ("Tell me a story about {}.", 8),
    ("Can you tell me a story about {}?", 6),
    ("Please tell me a short story about {}.", 4),
    ("Tell me a short story about {}.", 1),
    ("Write a story about {}.", 1),
    ("Write a short story about {}.", 1),
    ("I want to hear a story about {}.", 1),
    ("Could you make up a story about {}?", 1),
]
WORDS = [
    ("Write a short story that uses the words {}.", 14),
    ("Write a story that uses the words {}.", 1),
    ("Tell me a story with the words {}.", 1),
    ("Please write a short story using the words {}.", 1),
    ("Make up a short story with the words {}.", 1),
]
FINISH = [
    ("Finish this story: {}", 14),
    ("Please finish this story: {}", 1),
    ("Continue this story: {}", 1),
    ("How does this story go on? {}", 1),
]
ALL_NAMES = frozenset(GIRLS) | frozenset(BOYS)
CAPITALISED = re.compile(r"\b[A-Z][a-z]+\b")
WORD = re.compile(r"[a-z]{3,}")
SENTENCE_END = re.compile(r"[.!?]\"?(?=\s)")
SUBJECT = re.compile(
    r"\b(?:there (?:was|lived|were)|once,? |saw|had|found|met|named?)\s+"
    r"((?:an?|two|three) [a-z ]{2,40}?(?: (?:named|called) [A-Z][a-z]+)?)"
    r"(?=[.!]|, (?:who|and|in|on|which|with|named|called)"
    r"| (?:who|that|and|in|on|at|to|with|from|was|had|named|called)\b)"
)
NOUN = re.compile(r"\b(?:an?|the) ((?:[a-z]+ )?)([a-z]{3,})\b")


@dataclass(frozen=True)
class Example:
    """One prompt, the answer to it, and the words that the prompt asks for."""

    prompt: str
    answer: str
    requested: tuple[str, ...] = ()


def read_rows(path: Path) -> list[dict]:
    """Rows of a JSON-lines file, gzipped or not."""
    if not path.is_file():
        raise SystemExit(f"error: there is no file {path}; --data must name the data folder.")
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = gzip.decompress(content)
    return [json.loads(line) for line in content.decode().split("\n") if line]


def read_stories(data: Path, split: str) -> list[str]:
    """The plain stories of a split ("train" or "valid")."""
    return [row["text"] for row in read_rows(data / "lm" / f"stories.{split}.jsonl.gz")]


def read_chat(data: Path, split: str) -> list[Example]:
    """The stories of a split behind the corpus' own prompts."""
    rows = read_rows(data / "lm" / f"story_chat.{split}.jsonl.gz")
    return [Example(*(message["content"] for message in row["messages"])) for row in rows]


def words_of(text: str) -> set[str]:
    """Different lower-case words of a text, of three letters or more."""
    return set(WORD.findall(text.lower()))


class PromptMaker:
    """Draws a prompt for a story; the same seed gives the same prompts."""

    def __init__(self, stories: Iterable[str], common: float = 0.12) -> None:
        stories = list(stories)
        counts = Counter(word for story in stories for word in words_of(story))
        names = Counter(name.lower() for s in stories for name in CAPITALISED.findall(s)[1:])
        plain = Counter(word for story in stories for word in WORD.findall(story))
        limit = max(4, common * len(stories))
        self.usable = {word for word, count in counts.items() if 2 < count < limit and names[word] < 0.5 * plain[word]}
        self.weight = {word: 1.0 / counts[word] ** 0.5 for word in self.usable}
        self.girls = Counter(n for s in stories for n in GIRLS if n in s)
        self.boys = Counter(n for s in stories for n in BOYS if n in s)

    def make(self, story: str, rng: random.Random, swap: float = 0.4) -> Example:
        """A prompt for the story, and what answers it."""
        if rng.random() < swap:
            story = self.exchange_names(story, rng)
        kind = rng.choices(("about", "words", "finish"), (36, 34, 30))[0]
        if kind == "finish":
            example = self.finish(story, rng)
        elif kind == "about":
            example = self.about(story, rng)
        else:
            example = None
        return example or self.use_words(story, rng)

    def exchange_names(self, story: str, rng: random.Random) -> str:
        """Give children other names of the same sex, as often as the corpus has them."""
        present = [name for name in dict.fromkeys(CAPITALISED.findall(story)) if name in ALL_NAMES]
        taken, mapping = set(present), {}
        for name in present:
            pool = self.girls if name in GIRLS else self.boys
            free = [n for n in pool if n not in taken]
            if free:
                mapping[name] = rng.choices(free, [pool[n] for n in free])[0]
                taken.add(mapping[name])
        return CAPITALISED.sub(lambda match: mapping.get(match[0], match[0]), story)

    def finish(self, story: str, rng: random.Random) -> Example | None:
        """Cut after the first sentence, sometimes the second or third."""
        ends = [match.end() for match in SENTENCE_END.finditer(story)][:-1]
        if len(ends) < 2:
            return None
        cut = ends[min(rng.choices((0, 1, 2), (85, 10, 5))[0], len(ends) - 2)]
        return Example(fill(FINISH, story[:cut], rng), story[cut:].strip())

    def about(self, story: str, rng: random.Random) -> Example | None:
        """Name somebody or something that matters in the story."""
        opening = story[:160]
        subject = SUBJECT.search(opening)
        if subject and rng.random() < 0.55:
            phrase = subject[1]
            named = re.match(r",? (?:named|called) [A-Z][a-z]+", opening[subject.end() :])
            return Example(fill(ABOUT, phrase + (named[0].lstrip(",") if named else ""), rng), story)
        seen = Counter(noun for _, noun in NOUN.findall(story) if noun in self.usable)
        nouns = [noun for noun, count in seen.items() if count > 1]
        names = [n for n, c in Counter(CAPITALISED.findall(story)).items() if c > 2 and n in ALL_NAMES]
        if names and rng.random() < 0.3:
            name = names[0]
            child = "girl" if name in GIRLS else "boy"
            phrase = rng.choice([name, f"a {child} named {name}", f"a {child} called {name}"])
            if len(names) > 1 and rng.random() < 0.5:
                phrase = f"{names[0]} and {names[1]}"
            elif nouns and rng.random() < 0.5:
                phrase += " and " + with_article(rng.choice(nouns), rng)
        elif nouns:
            weights = [seen[noun] * self.weight[noun] for noun in nouns]
            first, second = rng.choices(nouns, weights, k=2)
            phrase = with_article(first, rng)
            if second != first and rng.random() < 0.35:
                phrase += " and " + with_article(second, rng)
        else:
            return None
        return Example(fill(ABOUT, phrase, rng), story, tuple(WORD.findall(phrase)))

    def use_words(self, story: str, rng: random.Random) -> Example:
        """Ask for words that the story has: mostly three, mostly not the commonest."""
        pool = sorted(words_of(story) & self.usable) or sorted(words_of(story)) or ["story"]
        count = min(len(pool), rng.choices((2, 3, 4), (8, 84, 8))[0])
        keys = {word: rng.random() ** (1 / self.weight.get(word, 0.01)) for word in pool}
        chosen = sorted(pool, key=keys.__getitem__)[-count:]
        chosen = sorted(chosen) if rng.random() < 0.7 else rng.sample(chosen, count)
        listed = " and ".join(filter(None, [", ".join(chosen[:-1]), chosen[-1]]))
        return Example(fill(WORDS, listed, rng), story, tuple(chosen))


def fill(templates: list[tuple[str, int]], content: str, rng: random.Random) -> str:
    """Draw a phrasing and put the content into it."""
    texts, weights = zip(*templates, strict=True)
    text = rng.choices(texts, weights)[0]
    if text.startswith("How") or not text.endswith("{}."):
        return text.format(content)
    return text.format(content.rstrip("."))


def with_article(noun: str, rng: random.Random) -> str:
    """ "a dog", "an owl", sometimes "the dog"; plurals keep none."""
    if noun.endswith("s") and not noun.endswith("ss"):
        return noun
    if rng.random() < 0.1:
        return f"the {noun}"
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
