"""Prompts as the plain text that a reward model reads."""

from __future__ import annotations

from aisp_local.types import Prompt


def prompt_text(prompt: Prompt) -> str:
    """A string as it is; a single user message as its content; a conversation as "role: content" lines."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def clean(text: str) -> str:
    """The text with lone surrogates replaced, so that a tokenizer takes it."""
    return text.encode("utf-8", "replace").decode("utf-8")
