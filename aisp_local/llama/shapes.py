"""Answers in the shapes of llama-cpp-python's responses."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from aisp_local.types import TokenLogprob


@dataclass(frozen=True)
class Answer:
    """``entries``: None unless log-probabilities were asked for."""

    text: str
    finish_reason: str
    n_tokens: int
    entries: Sequence[TokenLogprob] | None = None


@dataclass(frozen=True)
class Shape:
    """What the pieces of one response have in common. ``echo`` precedes the answer."""

    model: str
    prompt_tokens: int
    prompt_length: int  # characters
    echo: str = ""
    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4()}")
    created: int = field(default_factory=lambda: int(time.time()))

    def completion(self, answer: Answer) -> dict[str, Any]:
        whole = self.chunk(self.echo + answer.text, answer.finish_reason, self.logprobs(answer.entries, 0))
        usage = {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": answer.n_tokens,
            "total_tokens": self.prompt_tokens + answer.n_tokens,
        }
        return whole | {"usage": usage}

    def chunk(self, text: str, finish: str | None = None, logprobs: dict[str, Any] | None = None) -> dict[str, Any]:
        choice = {"text": text, "index": 0, "logprobs": logprobs, "finish_reason": finish}
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": [choice],
        }

    def logprobs(self, entries: Sequence[TokenLogprob] | None, start: int) -> dict[str, Any] | None:
        """Of the entries from ``start`` on; None if there are none."""
        if entries is None or (start and start == len(entries)):
            return None
        texts = [_text(entry.piece) for entry in entries]
        offsets = [self.prompt_length + sum(map(len, texts[:i])) for i in range(len(texts))]
        tops = [{_text(piece): value for piece, value in entry.top} for entry in entries]
        for top, text, entry in zip(tops, texts, entries, strict=True):
            top[text] = entry.logprob
        return {
            "tokens": texts[start:],
            "text_offset": offsets[start:],
            "token_logprobs": [entry.logprob for entry in entries[start:]],
            "top_logprobs": tops[start:],
        }


def _text(piece: bytes) -> str:
    return piece.decode("utf-8", "ignore")
