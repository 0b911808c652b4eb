"""From a prompt to tokens: the model's own chat template for messages, plain text as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from aisp_local.errors import InputError
from aisp_local.native import Model
from aisp_local.types import Message, Prompt


def check_prompts(prompts: Sequence[Prompt]) -> None:
    """Raise InputError for one prompt where many belong."""
    if isinstance(prompts, str) or any(isinstance(prompt, dict) for prompt in prompts):
        raise InputError("that is one prompt; give a list of prompts")


def check_messages(messages: Sequence[Message]) -> None:
    """Raise InputError unless these are messages that a chat template can take."""
    if not messages:
        raise InputError("the conversation is empty; give at least one message")
    for number, message in enumerate(messages, start=1):
        if not (
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
        ):
            raise InputError(f"message {number} is not of the form {{'role': ..., 'content': ...}} with text in both")


def render(model: Model, messages: Sequence[Message]) -> str:
    """The conversation as the model's chat template writes it, up to the assistant's turn."""
    check_messages(messages)
    template = model.chat_template()
    if template is None:
        raise InputError(
            f"{model.path} has no chat template, which a conversation needs; give the prompt as plain text "
            "(generate --raw, /v1/completions)"
        )
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    try:
        formatter = Jinja2ChatFormatter(
            template=template,
            bos_token=model.token_text(model.bos),
            eos_token=model.token_text(model.eos),
        )
        return str(formatter(messages=cast(Any, list(messages))).prompt)
    except Exception as error:
        raise InputError(f"the model's chat template refused the conversation: {error}") from error


def prompt_tokens(model: Model, prompt: Prompt) -> npt.NDArray[np.int32]:
    """Tokens [P] of a prompt. Raises InputError if there is nothing to continue."""
    if isinstance(prompt, str):
        if not prompt.strip():
            raise InputError("the prompt is empty; give some text")
        text = prompt
    else:
        text = render(model, prompt)
    bos = model.token_text(model.bos)
    twice = model.adds_bos and bool(bos) and text.startswith(bos)  # the template wrote it already
    tokens = model.tokenize(text, add_special=not twice, parse_special=True)
    if len(tokens) == 0:
        raise InputError("the prompt has no tokens; give some text")
    return tokens
