"""Chat templates as transformers renders them, in bounded time and without a clock."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from aisp_local.errors import RewardError, ScoreError
from aisp_local.rewards.metered_jinja import Meter, MeteredEnvironment, RanAwayError
from aisp_local.types import Message

# Templates may write a date; a fixed one, or scores would change from day to day. It is the one that Llama 3's
# templates write by themselves.
NOW = datetime(2024, 7, 26)
# Work that a template may do; see metered_jinja. A text that grows turn by turn costs its length at every turn.
_WORK, _MOST_WORK = 1 << 26, 1 << 30
_WORK_PER_CHARACTER, _WORK_PER_TURN = 1024, 1 << 18
_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# How the known tokenizers call them; for those that do not put them around a text by themselves.
_USUAL = {
    "bos_token": ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "<\uff5cbegin\u2581of\u2581sentence\uff5c>"),
    "eos_token": (
        "</s>",
        "<eos>",
        "<|im_end|>",
        "<|eot_id|>",
        "<|end|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|end_of_turn|>",
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
    ),
}


class _Refused(Exception):
    """What a template said with raise_exception."""


class _Generation(Extension):
    """``{% generation %}``, with which templates mark what a model is trained on: it writes what is inside."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_write"), [], [], body).set_lineno(line)

    def _write(self, caller: Any) -> Any:
        return caller()


class ChatTemplate:
    """The template of a reward folder.

    ``tokens``: the special tokens by their names (``bos_token``, ...) as far as the folder tells them; ``candidates``:
    special tokens of the tokenizer, which a message names where a token is missing. Raises RewardError for a template
    that is not valid, or that names a token which the folder lacks.
    """

    def __init__(self, source: str, name: str, tokens: Mapping[str, str], candidates: Sequence[str] = ()) -> None:
        self._source, self._name, self._tokens, self._candidates = source, name, tokens, candidates
        self._environment, self._template = self._compile()

    def _compile(self) -> tuple[MeteredEnvironment, Any]:
        environment = MeteredEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        environment.filters["tojson"] = environment.metered("tojson", _tojson)
        environment.globals |= {"raise_exception": _raise_exception, "strftime_now": NOW.strftime}
        try:
            tree = environment.parse(self._source)
            named = meta.find_undeclared_variables(tree)
            with environment.meter(Meter(_WORK)):
                template = environment.template(tree)
        except TemplateSyntaxError as error:
            raise RewardError(
                f"the chat template of the reward {self._name!r} is not valid Jinja, line {error.lineno}: "
                f"{error.message}; repair it"
            ) from error
        except RanAwayError as error:
            raise self._ran_away(error) from error
        except (TemplateError, RecursionError) as error:
            raise RewardError(
                f"the chat template of the reward {self._name!r} cannot be compiled: {error}; repair it"
            ) from error
        missing = [token for token in _TOKENS if token in named and token not in self._tokens]
        if missing:
            one = missing[0]
            usual = [token for token in self._candidates if token in _USUAL.get(one, ())] or list(self._candidates)
            example = usual[0] if usual else "</s>"
            raise RewardError(
                f"the chat template of the reward {self._name!r} names {one!r}, and its tokenizer.json does not tell "
                f"which token that is{' (perhaps ' + ' or '.join(usual[:4]) + ')' if usual else ''}; write it at the "
                f"beginning of the template: {{% set {one} = {json.dumps(example, ensure_ascii=False)} %}}"
            )
        return environment, template

    def render(self, messages: Sequence[Message]) -> str:
        """What the template writes. Raises ScoreError when it fails, RewardError when it would not end."""
        environment = self._environment
        characters = sum(len(message["role"]) + len(message["content"]) for message in messages)
        work = _WORK + _WORK_PER_CHARACTER * characters + _WORK_PER_TURN * len(messages)
        try:
            with environment.meter(Meter(min(work, _MOST_WORK))):
                return str(
                    self._template.render(
                        messages=messages, tools=None, documents=None, add_generation_prompt=False, **self._tokens
                    )
                )
        except RanAwayError as error:
            raise self._ran_away(error) from error
        except _Refused as error:
            roles = ", ".join([message["role"] for message in messages][:8] + ["..."] * (len(messages) > 8))
            raise ScoreError(
                f"the chat template of the reward {self._name!r} refuses this conversation of {roles}: {error}"
            ) from error
        except Exception as error:  # a template may raise whatever Python can
            raise ScoreError(f"the chat template of the reward {self._name!r} failed: {error}") from error

    def _ran_away(self, error: RanAwayError) -> RewardError:
        return RewardError(
            f"the chat template of the reward {self._name!r} does far more than a conversation needs ({error}); "
            "it would take very long or fill the memory: repair it"
        )


def usual_tokens(special: Sequence[str]) -> dict[str, str]:
    """The special tokens by their names, where exactly one of a tokenizer's goes by a usual name."""
    found = {name: [token for token in usual if token in special] for name, usual in _USUAL.items()}
    return {name: tokens[0] for name, tokens in found.items() if len(tokens) == 1}


def _raise_exception(message: object) -> None:
    raise _Refused(str(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Without the escapes of HTML that Jinja's own has."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
