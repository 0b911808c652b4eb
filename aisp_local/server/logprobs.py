"""Log-probabilities in the two shapes of the OpenAI API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from aisp_local.types import TokenLogprob


def of_chat(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    """``choices[].logprobs`` of a chat completion."""
    content = [
        _entry(one.piece, one.logprob) | {"top_logprobs": [_entry(piece, logprob) for piece, logprob in one.top]}
        for one in tokens
    ]
    return {"content": content, "refusal": None}


def _entry(piece: bytes, logprob: float) -> dict[str, Any]:
    return {"token": _text(piece), "logprob": logprob, "bytes": list(piece)}


def of_completion(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    """``choices[].logprobs`` of a completion: the token itself is among the likeliest ones even if it is not.

    ``text_offset`` counts characters of the choice's text.
    """
    offsets, data = [], b""
    for one in tokens:
        offsets.append(len(data.decode("utf-8", "ignore")))
        data += one.piece
    return {
        "tokens": [_text(one.piece) for one in tokens],
        "token_logprobs": [one.logprob for one in tokens],
        "top_logprobs": [
            {_text(piece): logprob for piece, logprob in (*reversed(one.top), (one.piece, one.logprob))}
            for one in tokens
        ],
        "text_offset": offsets,
    }


def _text(piece: bytes) -> str:
    return piece.decode("utf-8", "replace")
