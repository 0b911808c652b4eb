"""What a client may ask: the OpenAI API's fields, and the alignment's under one key of its own."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from aisp_local.controllers import defaults_of
from aisp_local.defaults import DEFAULT_EFFORT, DEFAULT_METHOD, DEFAULT_SEED, EFFORT, STREAMED, check_search
from aisp_local.errors import InputError
from aisp_local.grammar import Grammar
from aisp_local.types import Message, Prompt

KEY = "aisp"
"""The key of a request that holds what the OpenAI API has no field for."""

MAX_N = 32
_ROLES = ("system", "developer", "user", "assistant", "tool")
_UNSUPPORTED = {
    "tools": "tools are not supported",
    "functions": "functions are not supported",
    "logit_bias": "logit_bias is not supported",
    "audio": "audio is not supported",
    "echo": "echo is not supported",
    "suffix": "suffix is not supported",
}
_MOST = {"candidates": 40}  # options with which a decode step, which all wait for, would take too long
_WHOLE = {"window"}  # options of which the default does not say it
_LONGEST_MESSAGE = 1000  # characters of what a client sent come back in it
_HALF = re.compile(r"\\u[dD][89abAB]")  # of a character that JSON writes as two
_SEARCH = {"effort", "budget", "rows", "method", "strength", "seed", "time_limit", "target_reward", "patience"}


class ApiError(Exception):
    """An answer that is an error, in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        if len(message) > _LONGEST_MESSAGE:
            message = message[:_LONGEST_MESSAGE] + "…"
        super().__init__(message)
        self.status, self.message, self.kind, self.param, self.code = status, message, kind, param, code
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Ask:
    """A request, checked. ``options``: of the method. ``events``: the client wants to see the search, with
    ``candidates`` all of it. ``baseline``: the unaligned answer as well; ``judge_all``: the judge's score of every
    candidate; ``trace``: all of the search, in the form of a trace. ``settle``: may be chosen block by block.
    ``logprobs``: how many of the likeliest tokens to tell at each place of the answer; None: no log-probabilities."""

    prompt: Prompt
    chat: bool
    model: str
    n: int = 1
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False
    seed: int = DEFAULT_SEED
    method: str = DEFAULT_METHOD
    budget: int = EFFORT[DEFAULT_EFFORT]
    rows: int | None = None
    time_limit: float | None = None
    target_reward: float | None = None
    patience: int | None = None
    events: bool = False
    candidates: bool = False
    baseline: bool = False
    judge_all: bool = False
    trace: bool = False
    settle: bool = True
    grammar: Grammar | None = None
    logprobs: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def settles(self) -> bool:
        """Whether the answer is chosen block by block, so that it can be streamed while it is aligned."""
        whole = self.logprobs is not None  # they are computed when the answer is there
        return self.stream and self.settle and self.method in STREAMED and self.n == 1 and not whole


def parse(data: bytes, *, chat: bool, limit: int) -> Ask:
    """The request in a body of JSON. ``limit``: rollouts that one request may ask for. Raises ApiError."""
    try:
        text = data.decode("utf-8")
        body = json.loads(text)
        if _HALF.search(text):
            json.dumps(body, ensure_ascii=False).encode("utf-8")  # an error for a half without the other
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON in UTF-8 ({error})") from error
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object")
    for name, message in _UNSUPPORTED.items():
        if body.get(name):
            raise ApiError(400, f"{message}; leave it out", param=name, code="unsupported_parameter")
    more = {} if body.get(KEY) is None else body[KEY]
    if not isinstance(more, dict):
        raise ApiError(400, f"{KEY} must be an object", param=KEY)
    more = {name: value for name, value in more.items() if value is not None}
    method = _text(more, "method", DEFAULT_METHOD)
    try:
        known = defaults_of(method)
    except InputError as error:
        raise ApiError(400, str(error), param=f"{KEY}.method") from error
    unknown = sorted(
        set(more) - _SEARCH - {"events", "candidates", "baseline", "judge_all", "trace", "settle", "options"}
    )
    if unknown:
        raise ApiError(400, f"{KEY}.{unknown[0]} is unknown", param=KEY)
    options = dict(_object(more, "options"))
    if "strength" in more and "strength" not in known:
        raise ApiError(400, f"the method {method!r} has no strength", param=f"{KEY}.strength")
    if "strength" in more:
        options["strength"] = _number(more, "strength", 0.0, 1.0)
    for name, value in options.items():
        if name not in known:
            raise ApiError(400, f"the method {method!r} has no option {name!r}", param=f"{KEY}.options")
        if (wrong := _wrong(name, value, known[name])) is not None:
            raise ApiError(400, f"the option {name!r} must be {wrong}", param=f"{KEY}.options")
    for name in ("temperature", "top_p"):  # clients send them with every request: for a method that has none, no error
        if body.get(name) is not None:
            value = _number(body, name, 0.0, 2.0 if name == "temperature" else 1.0)
            if name in known and method == "best-of-n":
                options.setdefault(name, value)
    budget = _whole(more, "budget", 1, limit) if "budget" in more else min(EFFORT[_effort(more)], limit)
    tokens = next((key for key in ("max_completion_tokens", "max_tokens") if body.get(key) is not None), None)
    ask = Ask(
        prompt=_messages(body) if chat else _plain(body),
        chat=chat,
        model=_text(body, "model", ""),
        n=_whole(body, "n", 1, MAX_N) if body.get("n") is not None else 1,
        max_tokens=None if tokens is None else _whole(body, tokens, 1, 2**20),
        stop=_stops(body),
        stream=_flag(body, "stream"),
        include_usage=_flag(_object(body, "stream_options"), "include_usage"),
        seed=_whole(more, "seed", 0, 2**63) if "seed" in more else _seed(body),
        method=method,
        budget=budget,
        rows=_whole(more, "rows", 1, limit) if "rows" in more else None,
        time_limit=_number(more, "time_limit", 1e-3, math.inf) if "time_limit" in more else None,
        target_reward=_number(more, "target_reward", -math.inf, math.inf) if "target_reward" in more else None,
        patience=_whole(more, "patience", 1, 2**20) if "patience" in more else None,
        events=_flag(more, "events"),
        candidates=_flag(more, "candidates"),
        baseline=_flag(more, "baseline"),
        judge_all=_flag(more, "judge_all"),
        trace=_flag(more, "trace"),
        settle=_flag(more, "settle") if "settle" in more else True,
        grammar=_grammar(body),
        logprobs=_chat_logprobs(body) if chat else _plain_logprobs(body),
        options=options,
    )
    if ask.n > ask.budget:
        raise ApiError(400, f"n is {ask.n} and the search has {ask.budget} rollouts; raise {KEY}.budget", param="n")
    try:
        check_search(
            method=method,
            budget=budget,
            n=ask.rows,
            max_tokens=ask.max_tokens or 1,
            seed=ask.seed,
            time_limit=ask.time_limit,
            **options,
        )
    except InputError as error:
        raise ApiError(400, str(error), param=KEY) from error
    return ask


def _wrong(name: str, value: Any, default: Any) -> str | None:
    """What an option must be, if it is not. Texts name files of this machine, which are no client's business."""
    if value is None:
        return None
    if isinstance(default, bool):
        return None if isinstance(value, bool) else "true or false"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "a number"
    if (name in _WHOLE or isinstance(default, int)) and not isinstance(value, int):
        return "a whole number"
    return None if value <= _MOST.get(name, math.inf) else f"at most {_MOST[name]}"


def _effort(more: Mapping[str, Any]) -> str:
    effort = _text(more, "effort", DEFAULT_EFFORT)
    if effort not in EFFORT:
        raise ApiError(400, f"the effort {effort!r} is unknown; use {', '.join(EFFORT)}", param=f"{KEY}.effort")
    return effort


def _grammar(body: Mapping[str, Any]) -> Grammar | None:
    """What ``response_format`` or llama.cpp's ``grammar`` holds the answer to."""
    form, param = _object(body, "response_format"), "response_format"
    kind = form.get("type", "text")
    given: Any = None
    if kind == "json_object":
        given = {"type": "object"}
    elif kind == "json_schema":
        given, param = _object(form, "json_schema").get("schema"), "response_format.json_schema.schema"
        if not isinstance(given, dict):
            raise ApiError(400, f"{param} must be an object", param=param)
    elif kind != "text":
        raise ApiError(400, "response_format.type must be text, json_object or json_schema", param=param)
    if body.get("grammar") is not None:
        if given is not None:
            raise ApiError(400, "grammar and response_format are two ways to say the same; send one", param="grammar")
        given, param = _text(body, "grammar", ""), "grammar"
    try:
        return None if not given else Grammar.of(given)
    except InputError as error:
        raise ApiError(400, str(error), param=param) from error
    except RecursionError as error:
        raise ApiError(400, f"{param} is nested too deeply", param=param) from error


def _chat_logprobs(body: Mapping[str, Any]) -> int | None:
    top = body.get("top_logprobs")
    if not _flag(body, "logprobs"):
        if top:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        return None
    return 0 if top is None else _whole(body, "top_logprobs", 0, 20)


def _plain_logprobs(body: Mapping[str, Any]) -> int | None:
    return None if body.get("logprobs") is None else _whole(body, "logprobs", 0, 20)


def _messages(body: Mapping[str, Any]) -> list[Message]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "messages must be a list that is not empty", param="messages")
    found: list[Message] = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            raise ApiError(400, f"{where} needs a role: {', '.join(_ROLES)}", param=f"{where}.role")
        role = "system" if message["role"] == "developer" else message["role"]
        found.append({"role": role, "content": _content(message.get("content"), where)})
    return found


def _content(content: Any, where: str) -> str:
    """A string, or parts of text, as newer clients send them."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in content
    ):
        return "".join(part["text"] for part in content)
    raise ApiError(400, f"{where}.content must be text", param=f"{where}.content")


def _plain(body: Mapping[str, Any]) -> str:
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str) or not prompt:
        raise ApiError(400, "prompt must be a string that is not empty", param="prompt")
    return prompt


def _stops(body: Mapping[str, Any]) -> tuple[str, ...]:
    stop = body.get("stop")
    if stop is None:
        return ()
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or len(stops) > 16 or not all(isinstance(text, str) and text for text in stops):
        raise ApiError(400, "stop must be a string or up to 16 strings, none of them empty", param="stop")
    return tuple(stops)


def _seed(body: Mapping[str, Any]) -> int:
    return DEFAULT_SEED if body.get("seed") is None else _whole(body, "seed", 0, 2**63)


def _object(body: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = body.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ApiError(400, f"{name} must be an object", param=name)
    return value


def _text(body: Mapping[str, Any], name: str, default: str) -> str:
    value = body.get(name, default)
    if not isinstance(value, str):
        raise ApiError(400, f"{name} must be a string", param=name)
    return value


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise ApiError(400, f"{name} must be true or false", param=name)
    return bool(value)


def _whole(body: Mapping[str, Any], name: str, low: int, high: int) -> int:
    value = body[name]
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ApiError(400, f"{name} must be a whole number from {low} to {high}", param=name)
    return value


def _number(body: Mapping[str, Any], name: str, low: float, high: float) -> float:
    value = body[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high or not _finite(value):
        least = "" if low == -math.inf else f" from {low:g}" if high < math.inf else f" of at least {low:g}"
        raise ApiError(400, f"{name} must be a number{least}{f' to {high:g}' if high < math.inf else ''}", param=name)
    return float(value)


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that is larger than any other kind
        return False
