"""Token sequences and batches of similar length."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
from tokenizers import Tokenizer
from torch import Tensor

from training.corpus import Example
from training.tokenizer import END_OF_TEXT, TURN_END, render_prompt

Item = TypeVar("Item", contravariant=True)


class Maker(Protocol[Item]):
    """Makes an example of a text of the corpus, afresh in every epoch."""

    def make(self, item: Item, rng: random.Random) -> Example: ...


@dataclass(frozen=True)
class Document:
    """Tokens of one prompt and its answer; the first `prompt` of them are the prompt's.

    `requested` are the places of the tokens where a word that the prompt asks for first occurs.
    """

    tokens: list[int]
    prompt: int
    requested: list[int] = field(default_factory=list)


def encode(tokenizer: Tokenizer, examples: Sequence[Example], limit: int) -> list[Document]:
    """Tokens of prompt, answer and end of turn, cut to the limit."""
    prompts = tokenizer.encode_batch([render_prompt(example.prompt) for example in examples])
    answers = tokenizer.encode_batch([example.answer for example in examples])
    return [
        Document(
            [*prompt.ids, *answer.ids, TURN_END][:limit],
            len(prompt.ids),
            [len(prompt.ids) + place for place in places(example, answer.offsets)],
        )
        for example, prompt, answer in zip(examples, prompts, answers, strict=True)
        if len(prompt.ids) < limit // 2
    ]


def places(example: Example, offsets: list[tuple[int, int]]) -> list[int]:
    """Tokens of the answer, given as spans of characters, where a requested word first occurs."""
    text = example.answer.lower()
    found = [re.search(rf"\b{word}", text) for word in example.requested]
    spans = [match.span() for match in found if match]
    return [i for i, (a, b) in enumerate(offsets) if any(a < stop and start < b for start, stop in spans)]


def collate(sequences: Sequence[Document], emphasis: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, targets and the targets' weights, each [batch, time].

    A target of -100 is not counted; the first occurrence of a requested word weighs `emphasis`.
    """
    time = max(len(sequence.tokens) for sequence in sequences) - 1
    inputs = torch.full((len(sequences), time), END_OF_TEXT)
    targets = torch.full((len(sequences), time), -100)
    weights = torch.ones(len(sequences), time)
    for row, sequence in enumerate(sequences):
        tokens = torch.tensor(sequence.tokens)
        inputs[row, : len(tokens) - 1] = tokens[:-1]
        targets[row, sequence.prompt - 1 : len(tokens) - 1] = tokens[sequence.prompt :]
        weights[row, [place - 1 for place in sequence.requested if place < len(tokens)]] = emphasis
    return inputs, targets, weights


def group(sequences: list[Document], batch_tokens: int, rng: random.Random, pool: int = 24) -> list[list[Document]]:
    """Shuffle, sort within pools of several batches, and cut by the number of tokens."""
    order = rng.sample(sequences, len(sequences))
    chunk = max(1, pool * batch_tokens // 256)
    batches: list[list[Document]] = []
    for start in range(0, len(order), chunk):
        batch: list[Document] = []
        for sequence in sorted(order[start : start + chunk], key=lambda s: len(s.tokens)):
            if batch and (len(batch) + 1) * len(sequence.tokens) > batch_tokens:
                batches.append(batch)
                batch = []
            batch.append(sequence)
        batches.append(batch)
    rng.shuffle(batches)
    return batches


def epochs(
    corpus: Sequence[Item],
    maker: Maker[Item],
    tokenizer: Tokenizer,
    *,
    batch_tokens: int,
    limit: int,
    seed: int,
    start: int = 0,
) -> Iterator[list[Document]]:
    """Batches without end, from batch `start` on: every epoch has new prompts and a new order."""
    epoch, seen = 0, 0
    while True:
        rng = random.Random(f"{seed} {epoch}")
        examples = [maker.make(item, rng) for item in corpus]
        batches = group(encode(tokenizer, examples, limit), batch_tokens, rng)
        yield from batches[max(0, start - seen) :]
        seen += len(batches)
        epoch += 1
