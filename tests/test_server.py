"""The server as clients see it: OpenAI's own, and those that send rubbish or go away."""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Annotated, Any

import openai
import pydantic
import pytest
from click.testing import CliRunner

from aisp_local import Aligner, shipped
from aisp_local.cli.serve import serve
from aisp_local.defaults import DEFAULT_TOGETHER
from aisp_local.errors import InputError, ScoreError
from aisp_local.server import Server as Listening
from aisp_local.server import Settings, app, make_app
from aisp_local.server.request import ApiError, parse
from aisp_local.testing import FakeEngine, FakeReward
from aisp_local.trace import schema

STORY = [{"role": "user", "content": "Tell me a story about a fox."}]
QUICK = {"aisp": {"budget": 4, "rows": 4}}
ONE = {"budget": 8, "rows": 8, "method": "best-of-n"}  # at temperature 0 all rollouts are the same


class Server:
    """A running server and its clients."""

    def __init__(self, port: int, aligner: Aligner) -> None:
        self.port, self.aligner = port, aligner
        self.url = f"http://127.0.0.1:{port}/v1"

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, **({"api_key": "any", "max_retries": 0} | options))

    def send(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        kind = answer.headers.get("content-type", "")
        return answer.status, dict(answer.headers), json.loads(data) if kind == "application/json" else data.decode()

    def chat(self, **more: Any) -> tuple[int, dict[str, str], Any]:
        return self.send("POST", "/v1/chat/completions", json.dumps({"messages": STORY} | QUICK | more).encode())


@contextmanager
def serving(aligner: Aligner, settings: Settings | None = None, **options: Any) -> Iterator[Server]:
    server = Listening(make_app(aligner, settings), **options)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield Server(server.addresses[0][1], aligner)
    finally:
        server.should_exit = True
        thread.join()


def vowels(prompt: object, texts: Sequence[str]) -> list[float]:
    return [float(sum(c in "aeiou" for c in text)) for text in texts]


@contextmanager
def fake(reward: Any = vowels, **settings: Any) -> Iterator[Server]:
    with serving(Aligner(FakeEngine(), FakeReward(reward), model_name="fake.gguf"), Settings(**settings)) as made:
        yield made


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """The shipped models."""
    with Aligner.load(threads=1, together=DEFAULT_TOGETHER) as aligner, serving(aligner) as made:
        yield made


@pytest.mark.native
def test_the_openai_client(server: Server) -> None:
    client = server.client()
    assert [model.id for model in client.models.list()] == ["storyteller"]
    assert client.models.retrieve("storyteller").owned_by == "aisp-local"
    answer = client.chat.completions.create(
        model="storyteller", messages=STORY, max_tokens=16, seed=3, temperature=0.7, extra_body=QUICK
    )
    alone = server.aligner.generate(STORY, budget=4, n=4, max_tokens=16, seed=3)
    (choice,) = answer.choices
    assert choice.message.content == alone.answer and choice.message.role == "assistant"
    assert choice.finish_reason == "length" and answer.object == "chat.completion"
    assert answer.usage is not None and answer.usage.completion_tokens == 16
    assert answer.usage.prompt_tokens == len(server.aligner.engine.tokens(STORY))  # type: ignore[attr-defined]
    extra = answer.model_extra or {}
    assert extra["aisp"]["rollouts"] == 4 and extra["aisp"]["reward"] == pytest.approx(alone.reward)
    assert (answer.usage.model_extra or {})["search_tokens"] == alone.n_tokens
    plain = client.completions.create(model="storyteller", prompt="Once upon a time", max_tokens=8, extra_body=QUICK)
    assert plain.choices[0].text and plain.object == "text_completion"


@pytest.mark.native
def test_several_choices_are_the_best_that_differ(server: Server) -> None:
    answer = server.client().chat.completions.create(
        model="m", messages=STORY, max_tokens=12, n=3, extra_body={"aisp": {"budget": 8, "method": "best-of-n"}}
    )
    rewards = [(choice.model_extra or {})["aisp"]["reward"] for choice in answer.choices]
    texts = [choice.message.content for choice in answer.choices]
    assert len(set(texts)) == 3 and rewards == sorted(rewards, reverse=True)
    # Streamed, and with fewer of them than were asked for.
    stream = server.client().chat.completions.create(
        model="m", messages=STORY, max_tokens=2, n=8, stream=True, temperature=0, extra_body={"aisp": ONE}
    )
    chunks = [chunk.choices[0] for chunk in stream]
    assert [(c.index, c.delta.role or c.delta.content or c.finish_reason) for c in chunks][::2] == [
        (0, "assistant"),
        (0, "length"),
    ]


@pytest.mark.native
def test_an_answer_streams_while_it_is_aligned(server: Server) -> None:
    options: dict[str, Any] = {"model": "m", "messages": STORY, "max_tokens": 40, "extra_body": {"aisp": {"budget": 8}}}
    stream = server.client().chat.completions.create(stream=True, stream_options={"include_usage": True}, **options)
    chunks = list(stream)
    parts = [c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content]
    assert len(parts) >= 3  # block by block
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] in ("stop", "length")
    assert chunks[-1].usage is not None and not chunks[-1].choices
    alone = server.aligner.generate(STORY, budget=8, n=8, max_tokens=40, commit=True)
    assert "".join(parts) == alone.answer


@pytest.mark.native
def test_the_asynchronous_client_and_stop_strings(server: Server) -> None:
    async def ask() -> list[str]:
        client = openai.AsyncOpenAI(base_url=server.url, api_key="any", max_retries=0)
        stream = await client.chat.completions.create(
            model="m", messages=STORY, max_tokens=40, stop=["."], stream=True, extra_body=QUICK
        )
        parts = [chunk.choices[0].delta.content or "" async for chunk in stream]
        await client.close()
        return parts

    text = "".join(asyncio.run(ask()))
    assert text and "." not in text


class Fox(pydantic.BaseModel):
    name: Annotated[str, pydantic.Field(max_length=8)]
    age: Annotated[int, pydantic.Field(ge=1, le=20)]
    friend: Fox | None = None


@pytest.mark.native
def test_answers_in_json(server: Server) -> None:
    client = server.client()
    ask: dict[str, Any] = {"model": "m", "messages": STORY, "max_tokens": 100, "extra_body": {"aisp": {"budget": 12}}}
    parsed = client.chat.completions.parse(response_format=Fox, **ask)
    assert parsed.choices[0].finish_reason == "stop" and isinstance(parsed.choices[0].message.parsed, Fox)
    schema = {"type": "object", "properties": {"sly": {"type": "boolean"}}, "required": ["sly"]}
    form: Any = {"type": "json_schema", "json_schema": {"name": "fox", "schema": schema}}
    with client.chat.completions.create(response_format=form, stream=True, **ask) as stream:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert set(json.loads(text)) == {"sly"}
    ask["max_tokens"] = 3
    cut = client.chat.completions.create(response_format={"type": "json_object"}, **ask)
    assert cut.choices[0].finish_reason == "length" and cut.choices[0].message.content.startswith("{")  # type: ignore
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(response_format=Fox, **ask)


@pytest.mark.native
def test_answers_of_a_grammar(server: Server) -> None:
    client = server.client()
    extra = QUICK | {"grammar": 'root ::= "yes" | "no"'}
    answer = client.completions.create(model="m", prompt="A fox is red:", max_tokens=8, extra_body=extra)
    assert answer.choices[0].text in ("yes", "no") and answer.choices[0].finish_reason == "stop"
    with pytest.raises(openai.BadRequestError, match="a rule begins with itself"):
        client.completions.create(model="m", prompt="A", extra_body={"grammar": 'root ::= root "a" | "b"'})
    assert client.completions.create(model="m", prompt="A", max_tokens=2, extra_body=QUICK).choices[0].text


@pytest.mark.native
def test_log_probabilities_of_the_answer(server: Server) -> None:
    client = server.client()
    ask: dict[str, Any] = {"model": "m", "max_tokens": 10, "extra_body": QUICK}
    answer = client.chat.completions.create(messages=STORY, logprobs=True, top_logprobs=3, **ask)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None and answer.usage is not None
    assert "".join(one.token for one in logprobs.content) == answer.choices[0].message.content
    assert len(logprobs.content) == answer.usage.completion_tokens
    result = server.aligner.generate(STORY, budget=4, n=4, max_tokens=10)
    alone = server.aligner.token_logprobs(STORY, result.candidates[0], top=3)
    for one, expected in zip(logprobs.content, alone, strict=True):
        assert one.logprob == pytest.approx(expected.logprob, abs=1e-3) and bytes(one.bytes or []) == expected.piece
        assert [top.logprob for top in one.top_logprobs] == pytest.approx([p for _, p in expected.top], abs=1e-3)
    chunks = list(client.chat.completions.create(messages=STORY, logprobs=True, stream=True, **ask))
    told = [c.choices[0].logprobs for c in chunks if c.choices and c.choices[0].logprobs]
    assert len(told) == 1 and [one.token for one in told[0].content or []] == [one.token for one in logprobs.content]
    assert not any(one.top_logprobs for one in told[0].content or [])
    plain = client.completions.create(prompt="Once upon a time", logprobs=2, n=2, **ask)
    for choice in plain.choices:
        found = choice.logprobs
        assert found is not None and found.tokens and found.text_offset and found.top_logprobs and found.token_logprobs
        assert "".join(found.tokens) == choice.text
        for token, offset in zip(found.tokens, found.text_offset, strict=True):
            assert choice.text[offset:].startswith(token)
        for token, logprob, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
            assert top[token] == logprob and 2 <= len(top) <= 3
    assert client.completions.create(prompt="Once", **ask).choices[0].logprobs is None


def events(data: str) -> list[tuple[str, Any]]:
    found = []
    for block in data.strip().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.split("\n"))
        body = lines["data"]
        found.append((lines.get("event", ""), body if body == "[DONE]" else json.loads(body)))
    return found


def test_a_client_that_watches_sees_every_iteration() -> None:
    with fake() as server:
        more = {"budget": 12, "rows": 4, "method": "best-of-n", "events": True}
        status, headers, data = server.chat(stream=True, aisp=more)
        assert status == 200 and headers["content-type"].startswith("text/event-stream")
        seen = events(data)
        iterations = [body for name, body in seen if name == "aisp.iteration"]
        assert [body["iteration"] for body in iterations] == [1, 2, 3] and iterations[-1]["rollouts"] == 12
        assert [name for name, _ in seen].count("aisp.result") == 1 and seen[-1] == ("", "[DONE]")


def test_a_silent_stream_says_that_it_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    """In comments, which OpenAI's client passes over."""
    monkeypatch.setattr(app, "_QUIET", 0.05)
    with fake(slowly) as server:
        data = server.chat(stream=True, aisp={"budget": 8, "rows": 4, "method": "best-of-n"})[2]
        assert data.count(": the search goes on\n\n") >= 2 and data.endswith("data: [DONE]\n\n")
        more = {"aisp": {"budget": 8, "rows": 4, "method": "best-of-n"}}
        parts = list(server.client().chat.completions.create(model="m", messages=STORY, stream=True, extra_body=more))
        assert "".join(part.choices[0].delta.content or "" for part in parts)


class Stream:
    """A streamed answer, read event by event."""

    def __init__(self, server: Server, **body: Any) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        asked = {"messages": STORY, "stream": True} | body
        self.connection.request("POST", "/v1/chat/completions", json.dumps(asked).encode())
        self.answer = self.connection.getresponse()
        self.id = self.answer.headers["x-request-id"]

    def read(self, until: str | None = None) -> list[tuple[str, Any]]:
        """The events until the first of that name, or all that are left."""
        found: list[tuple[str, Any]] = []
        block = ""
        while (line := self.answer.readline().decode()) and not (found and found[-1][0] == until):
            block += line
            if block.endswith("\n\n"):
                found += events(block)
                block = ""
            if found and found[-1][0] == until:
                return found
        self.connection.close()
        return found


def slowly(prompt: object, texts: Sequence[str]) -> list[float]:
    time.sleep(0.1)
    return vowels(prompt, texts)


LONG = {"budget": 512, "rows": 4, "method": "best-of-n", "events": True, "trace": True}  # 13 seconds if none ends it


def test_a_search_that_is_cancelled_gives_its_best_so_far() -> None:
    with fake(slowly) as server:
        stream = Stream(server, aisp=LONG)
        begun = stream.read("aisp.iteration")
        assert begun[0][1]["id"] == stream.id
        path = f"/v1/chat/completions/{stream.id}/cancel"
        said = server.send("POST", path)[2]
        assert said == {"id": stream.id, "object": "chat.completion", "status": "cancelling"}
        seen = stream.read()
        results = {name: body for name, body in seen if name in ("aisp.result", "aisp.trace")}
        assert seen[-1] == ("", "[DONE]") and results["aisp.result"]["status"] == "interrupted"
        trace = results["aisp.trace"]
        schema().validate(trace)
        assert 4 <= len(trace["result"]["candidates"]) == results["aisp.result"]["rollouts"] < 512
        choices = [body["choices"][0] for name, body in begun + seen if name == "" and body != "[DONE]"]
        assert "".join(choice["delta"].get("content", "") for choice in choices) == trace["result"]["answer"]
        assert choices[-1]["finish_reason"] in ("stop", "length")
        best = max(candidate["reward"] for candidate in trace["result"]["candidates"])
        assert trace["result"]["reward"] == best
        status, _, body = server.send("POST", path)
        assert status == 404 and body["error"]["code"] == "not_found"


def test_the_openai_client_cancels_what_it_streams_and_sees_the_search() -> None:
    with fake(slowly) as server:
        client = server.client()
        stream = client.chat.completions.create(model="m", messages=STORY, stream=True, extra_body={"aisp": LONG})
        text, told = "", []
        for chunk in stream:
            if not chunk.choices:  # of the search
                told.append(chunk.model_extra or {})
                if len(told) == 1:
                    client.post(f"/chat/completions/{stream.response.headers['x-request-id']}/cancel", cast_to=object)
            else:
                text += chunk.choices[0].delta.content or ""
        assert [one["iteration"] for one in told if "iteration" in one][0] == 1
        assert text and {"status": "interrupted"}.items() <= told[-2].items() and told[-1]["result"]["answer"] == text
        done = client.completions.create(model="m", prompt="abc", stream=True, extra_body={"aisp": LONG})
        told.clear()
        for chunk in done:
            told.append(chunk.model_extra or {})
            if "iteration" in told[-1] and sum("iteration" in one for one in told) == 1:  # there is an answer
                client.post(f"/completions/{done.response.headers['x-request-id']}/cancel", cast_to=object)
        assert "interrupted" in [one.get("status") for one in told]


def until(true: Callable[[], Any]) -> None:
    end = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


def health(server: Server) -> Any:
    return server.send("GET", "/health")[2]


def test_one_that_waits_is_cancelled_at_once() -> None:
    reward = Slow()
    with fake(reward, parallel=1) as server:
        answers: list[int] = []
        first = threading.Thread(target=lambda: answers.append(server.chat()[0]))
        first.start()
        assert reward.asked.wait(10)
        stream = Stream(server, aisp=LONG)
        until(lambda: health(server)["waiting"] == 1)
        assert server.send("POST", f"/v1/chat/completions/{stream.id}/cancel")[0] == 200
        (error,) = [body["error"] for _, body in stream.read() if "error" in body]
        assert error["code"] == "cancelled" and health(server)["waiting"] == 0
        reward.go.set()
        first.join()
    assert answers == [200]


MANY = [f"value {i}" for i in range(30_000)]

RUBBISH: list[tuple[bytes, str]] = [
    (b"", "not valid JSON"),
    (b"\xff\xfe", "not valid JSON"),
    (b"[" * 100_000, "not valid JSON"),
    (b"[]", "must be a JSON object"),
    (b"{}", "messages must be a list"),
    (b'{"messages": [{"role": "user", "content": "\\ud83d"}]}', "surrogates not allowed"),
    (b'{"n": ' + b"9" * 5000 + b"}", "not valid JSON"),
    (b'{"messages": [{"role": "user", "content": "x"}], "aisp": {"time_limit": 1e999}}', "time_limit must be"),
    (
        b'{"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_schema", "json_schema": '
        b'{"schema": ' + b'{"items": ' * 400 + b"{}" + b"}" * 402 + b"}",
        "that is not a valid JSON schema",
    ),
    (b'{"messages": []}', "messages must be a list"),
    (b'{"messages": [{"role": "user"}]}', "messages[0].content must be text"),
    (b'{"messages": [{"role": "king", "content": "x"}]}', "messages[0] needs a role"),
    (b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "content must be text"),
    *[
        (json.dumps({"messages": STORY} | more).encode(), message)
        for more, message in (
            ({"n": 0}, "n must be a whole number"),
            ({"n": 3, "aisp": {"budget": 2}}, "n is 3 and the search has 2 rollouts"),
            ({"max_tokens": -1}, "max_tokens must be"),
            ({"max_tokens": True}, "max_tokens must be"),
            ({"stop": [""]}, "stop must be"),
            ({"stop": ["x"] * 17}, "stop must be"),
            ({"stream": 1}, "stream must be true or false"),
            ({"temperature": 3}, "temperature must be"),
            ({"temperature": "hot"}, "temperature must be"),
            ({"seed": -1}, "seed must be"),
            ({"tools": [{}]}, "tools are not supported"),
            ({"echo": True}, "echo is not supported"),
            ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": MANY}}}}, "at most 100000"),
            ({"aisp": {"target_reward": 10**400}}, "target_reward must be a number"),
            ({"aisp": {"time_limit": 0}}, "time_limit must be a number of at least"),
            ({"aisp": {"x" * 5000: 1}}, "aisp.xxx"),
            ({"response_format": {"type": "xml"}}, "response_format.type must be"),
            ({"response_format": "json"}, "response_format must be an object"),
            ({"response_format": {"type": "json_schema"}}, "json_schema.schema must be an object"),
            (
                {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}},
                "a grammar cannot hold a response to 'not'",
            ),
            ({"grammar": "root ::= ("}, "line 1, column 10: this parenthesis is never closed"),
            ({"grammar": 3}, "grammar must be a string"),
            ({"grammar": 'root ::= "a"', "response_format": {"type": "json_object"}}, "two ways to say the same"),
            ({"top_logprobs": 2}, "top_logprobs needs logprobs"),
            ({"logprobs": True, "top_logprobs": 21}, "top_logprobs must be"),
            ({"logprobs": 1}, "logprobs must be true or false"),
            ({"aisp": 3}, "aisp must be an object"),
            ({"aisp": {"effort": "huge"}}, "the effort 'huge' is unknown"),
            ({"aisp": {"budget": 10**6}}, "budget must be a whole number from 1 to 512"),
            ({"aisp": {"method": "magic"}}, "'magic' is unknown"),
            ({"aisp": {"strength": 2}}, "strength must be"),
            ({"aisp": {"method": "best-of-n", "strength": 0.5}}, "has no strength"),
            ({"aisp": {"options": {"seed": 1}}}, "has no option 'seed'"),
            ({"aisp": {"options": {"blocks": "x"}}}, "'blocks' must be a number"),
            ({"aisp": {"options": {"blocks": None}}}, "blocks is None; it must be a whole number"),
            ({"aisp": {"options": {"blocks": 1.5}}}, "'blocks' must be a whole number"),
            ({"aisp": {"options": {"commit": 1}}}, "'commit' must be true or false"),
            ({"aisp": {"method": "aisp", "options": {"window": 2.5}}}, "'window' must be a whole number"),
            ({"aisp": {"method": "re-control", "options": {"value": "/etc/hostname"}}}, "'value' must be a number"),
            ({"aisp": {"options": {"steering": [0.1]}}}, "'steering' must be a number"),
            ({"aisp": {"method": "args", "options": {"candidates": 10**9}}}, "must be at most 40"),
            ({"aisp": {"method": "best-of-n"}, "temperature": 1e-300}, "must be 0 (greedy) or at least"),
            ({"aisp": {"method": "best-of-n", "options": {"top_k": 1.5}}}, "'top_k' must be a whole number"),
            ({"aisp": {"nonsense": 1}}, "aisp.nonsense is unknown"),
            ({"aisp": {"time_limit": float("nan")}}, "time_limit must be"),
        )
    ],
]


@pytest.mark.parametrize(("body", "message"), RUBBISH)
def test_rubbish_is_refused_in_openais_shape(body: bytes, message: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse(body, chat=True, limit=512)
    assert caught.value.status == 400 and message in caught.value.message
    assert set(caught.value.body()["error"]) == {"message", "type", "param", "code"}
    assert len(json.dumps(caught.value.body())) < 2500


def test_what_clients_send_beside_what_is_understood_is_passed_over() -> None:
    nothing = {"tools": [], "logit_bias": {}, "stream_options": None, "response_format": None, "stop": None, "n": None}
    more = {"user": "x", "metadata": {}, "store": False, "parallel_tool_calls": True, "frequency_penalty": 0.5}
    body = {"messages": STORY, "aisp": {"budget": None, "time_limit": None}} | nothing | more
    body |= {"max_tokens": 9, "max_completion_tokens": 7, "seed": 3, "stop": "."}
    parts = [{"type": "text", "text": "\ud83d\ude00 a"}, {"type": "text", "text": " fox"}]
    body["messages"] = [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": parts}]
    ask = parse(json.dumps(body).encode(), chat=True, limit=512)
    assert ask.prompt == [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "\U0001f600 a fox"}]
    assert (ask.max_tokens, ask.seed, ask.stop, ask.time_limit) == (7, 3, (".",), None)
    assert parse(json.dumps(body | {"aisp": None}).encode(), chat=True, limit=512).budget == 32


def test_refusals_over_the_wire() -> None:
    with fake(max_body=2000, body_seconds=0.5, api_key="secret") as server:
        auth = {"Authorization": "Bearer secret"}
        good = json.dumps({"messages": STORY} | QUICK).encode()
        assert server.send("POST", "/v1/chat/completions", good, auth)[0] == 200
        for status, path, body, headers in (
            (400, "/v1/chat/completions", b"{", auth),
            (413, "/v1/chat/completions", b" " * 3000, auth),
            (401, "/v1/chat/completions", good, {}),
            (401, "/v1/models", None, {"Authorization": "Bearer wrong"}),
            (403, "/v1/models", None, auth | {"Host": "evil.example"}),
            (403, "/v1/models", None, auth | {"Origin": "http://evil.example"}),
            (404, "/v1/nothing", None, auth),
            (404, "/v1/models/other", None, auth),
            (405, "/v1/models", b"{}", auth),
            (404, "/v1/chat/completions/", good, auth),  # redirects nowhere
            (401, "/v1/chat/completions/x/cancel", b"", {}),
            (403, "/v1/chat/completions/x/cancel", b"", auth | {"Origin": "http://evil.example"}),
            (404, "/v1/chat/completions/x/cancel", b"", auth),
        ):
            found, _, answer = server.send("GET" if body is None else "POST", path, body, headers)
            assert (found, set(answer["error"])) == (status, {"message", "type", "param", "code"})
        assert server.send("GET", "/health")[0] == 200
        with pytest.raises(openai.AuthenticationError):
            server.client(api_key="no").models.list()
        # A client that says it will send and does not.
        with socket.create_connection(("127.0.0.1", server.port)) as slow:
            slow.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer secret\r\n")
            slow.sendall(b"Content-Length: 100\r\n\r\n{")
            assert b" 408 " in slow.recv(2000)
        assert server.send("GET", "/v1/models", None, {"Authorization": "bearer secret"})[0] == 200
        assert server.send("GET", "/v1/models", None, {"Authorization": "secret"})[0] == 401


def test_pages_that_may_call_the_server_are_told_so() -> None:
    with fake(origins=("http://page.example",)) as server:
        asked = {"Origin": "http://page.example", "Access-Control-Request-Method": "POST"}
        asked |= {"Access-Control-Request-Headers": "authorization,content-type"}
        status, headers, _ = server.send("OPTIONS", "/v1/chat/completions", None, asked)
        assert status == 200 and headers["access-control-allow-origin"] == "http://page.example"
        assert "authorization" in headers["access-control-allow-headers"]
        for path, status in (("/v1/models", 200), ("/v1/models/other", 404)):
            found = server.send("GET", path, None, {"Origin": "http://page.example"})
            assert found[0] == status and found[1]["access-control-allow-origin"] == "http://page.example"
        found = server.send("GET", "/v1/models", None, {"Origin": "http://other.example"})
        assert found[0] == 403 and "access-control-allow-origin" not in found[1]
    with fake(origins=("*",)) as server:
        assert server.send("GET", "/v1/models", None, {"Origin": "http://other.example"})[0] == 200


def test_a_head_that_never_ends_is_not_waited_for() -> None:
    aligner = Aligner(FakeEngine(), FakeReward(slowly), model_name="fake.gguf")
    with serving(aligner, Settings(), head_seconds=0.3) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as silent:
            with socket.create_connection(("127.0.0.1", server.port)) as slow:
                slow.settimeout(10)
                slow.sendall(b"GET /health HTTP/1.1\r\nHost: local")
                assert slow.recv(100) == b""
            assert silent.recv(100) == b""
        # An answer that takes longer is no head, also to a request that came with another.
        body = json.dumps({"messages": STORY, "aisp": {"budget": 128, "rows": 4, "method": "best-of-n"}}).encode()
        asked = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
        with socket.create_connection(("127.0.0.1", server.port)) as two, two.makefile("rb") as answers:
            two.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" + asked + body)
            found = answers.read()  # until the server closes
        assert found.count(b"200 OK") == 2 and float(re.findall(rb'"seconds":([\d.]+)', found)[0]) > 0.3


class Slow:
    """A reward that waits until it is let."""

    def __init__(self) -> None:
        self.go, self.asked = threading.Event(), threading.Event()

    def __call__(self, prompt: object, texts: Sequence[str]) -> list[float]:
        self.asked.set()
        self.go.wait(20)
        return [float(len(text)) for text in texts]


def test_a_full_queue_says_when_to_come_back() -> None:
    reward = Slow()
    with fake(reward, parallel=1, waiting=1) as server:
        answers: list[int] = []
        threads = [threading.Thread(target=lambda: answers.append(server.chat()[0])) for _ in range(2)]
        threads[0].start()
        assert reward.asked.wait(10)
        threads[1].start()
        while json.loads(json.dumps(server.send("GET", "/health")[2]))["waiting"] < 1:
            time.sleep(0.01)
        status, headers, body = server.chat()
        assert status == 429 and int(headers["retry-after"]) >= 1 and body["error"]["type"] == "rate_limit_error"
        reward.go.set()
        for thread in threads:
            thread.join()
        assert answers == [200, 200]
        metrics = server.send("GET", "/metrics")[2]
        assert "aisp_answered_total 2" in metrics and "aisp_refused_total 1" in metrics


@pytest.mark.native
def test_a_client_that_goes_away_cancels_its_search(server: Server) -> None:
    before = server.send("GET", "/metrics")[2]
    body = json.dumps({"messages": STORY, "aisp": {"budget": 512, "rows": 8}, "max_tokens": 200}).encode()
    gone = http.client.HTTPConnection("127.0.0.1", server.port)
    gone.request("POST", "/v1/chat/completions", body)
    while not server.send("GET", "/health")[2]["busy"]:
        time.sleep(0.01)
    gone.close()
    began = time.monotonic()
    while server.send("GET", "/health")[2]["busy"]:
        time.sleep(0.02)
    assert time.monotonic() - began < 10
    assert server.chat(max_tokens=8)[0] == 200
    assert "aisp_rollouts_total 512" not in server.send("GET", "/metrics")[2] != before


def test_a_client_that_goes_away_while_it_waits_is_not_served() -> None:
    reward = Slow()
    with fake(reward, parallel=1) as server:
        first = threading.Thread(target=server.chat)
        first.start()
        assert reward.asked.wait(10)
        gone = http.client.HTTPConnection("127.0.0.1", server.port)
        gone.request("POST", "/v1/chat/completions", json.dumps({"messages": STORY} | QUICK).encode())
        until(lambda: health(server)["waiting"] == 1)
        gone.close()
        until(lambda: health(server)["waiting"] == 0)  # its place is free before its turn would have come
        reward.go.set()
        first.join()
        metrics = server.send("GET", "/metrics")[2]
    assert "aisp_cancelled_total 1" in metrics and "aisp_answered_total 1" in metrics


def test_clients_that_go_away_at_once_leave_nothing_behind() -> None:
    with fake(slowly) as server:
        body = json.dumps({"messages": STORY, "aisp": LONG, "stream": True}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", server.port)) as one:
                one.sendall(head.encode() + body)
        until(lambda: "aisp_cancelled_total 20" in metrics(server))
        assert health(server)["running"] == health(server)["waiting"] == 0


@pytest.mark.native
def test_requests_in_one_batch_are_answered_as_each_would_be_alone(server: Server) -> None:
    """Methods, sizes and limits of all kinds at once, streamed and not; one client goes away, one is refused."""
    asked: list[dict[str, Any]] = [
        {"max_tokens": 24, "aisp": {"budget": 8, "rows": 4, "method": "best-of-n"}, "seed": 1},
        {"max_tokens": 16, "aisp": {"budget": 8}, "seed": 2, "stream": True},
        {"max_tokens": 12, "aisp": {"budget": 6, "rows": 3, "method": "aisp"}, "seed": 3, "stop": ["."]},
        {"max_tokens": 40, "aisp": {"budget": 4, "method": "best-of-n", "baseline": True}, "seed": 4},
        {"max_tokens": 10, "aisp": {"budget": 6, "method": "smc"}, "seed": 5},
        {"max_tokens": 8, "aisp": {"budget": 4, "rows": 4}, "messages": [{"role": "user", "content": "x " * 4000}]},
    ]

    def text(answer: tuple[int, Any, Any]) -> Any:
        status, _, body = answer
        if status != 200 or isinstance(body, dict):
            return status if status != 200 else body["choices"][0]["message"]["content"]
        chunks = [chunk for name, chunk in events(body) if name == "" and chunk != "[DONE]"]
        return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)

    alone = [text(server.chat(**one)) for one in asked]
    assert alone[-1] == 400
    before = server.send("GET", "/metrics")[2]
    gone = http.client.HTTPConnection("127.0.0.1", server.port)
    body = {"messages": STORY, "aisp": {"budget": 512, "rows": 8}, "max_tokens": 200}
    gone.request("POST", "/v1/chat/completions", json.dumps(body).encode())
    with ThreadPoolExecutor(len(asked)) as pool:
        calls = [pool.submit(server.chat, **one) for one in asked]
        gone.close()
        found = [text(call.result()) for call in calls]
    # Rounding may turn a near tie, and with it what the methods learn.
    assert sum(a == b for a, b in zip(found, alone, strict=True)) >= len(asked) - 2
    while server.send("GET", "/health")[2]["running"]:
        time.sleep(0.02)
    answered = [int(re.findall(r"aisp_answered_total (\d+)", text)[0]) for text in (before, metrics(server))]
    assert answered[1] - answered[0] <= len(asked)


def metrics(server: Server) -> str:
    return str(server.send("GET", "/metrics")[2])


@pytest.mark.native
def test_a_prompt_that_is_too_long_is_the_clients_fault(server: Server) -> None:
    for stream in (False, True):
        status, _, body = server.chat(messages=[{"role": "user", "content": "a fox " * 2000}], stream=stream)
        assert status == 400 and body["error"]["code"] == "context_length_exceeded"


def test_a_reward_that_fails_is_the_servers_fault_and_the_next_request_is_served() -> None:
    broken = [True]

    def sometimes(prompt: object, texts: Sequence[str]) -> list[float]:
        if broken[0]:
            raise ScoreError("the reward failed")
        return [1.0] * len(texts)

    with fake(sometimes) as server:
        status, _, body = server.chat()
        assert status == 500 and "the reward failed" in body["error"]["message"]
        seen = events(server.chat(stream=True)[2])
        assert any("error" in body for _, body in seen if isinstance(body, dict))
        broken[0] = False
        assert server.chat()[0] == 200


def test_texts_never_cross() -> None:
    """Many clients at once: each gets the answer to its own prompt."""

    def of_prompt(prompt: Any, texts: Sequence[str]) -> list[float]:
        return [float(prompt[0]["content"])] * len(texts)

    with fake(of_prompt, waiting=64) as server:
        found: dict[int, float] = {}

        def ask(i: int) -> None:
            status, _, body = server.chat(messages=[{"role": "user", "content": str(i)}], max_tokens=8)
            assert status == 200
            found[i] = body["aisp"]["reward"]

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == {i: float(i) for i in range(40)}


def test_closing_gives_the_best_so_far_and_refuses_those_that_wait() -> None:
    answers: dict[str, tuple[int, Any]] = {}
    scored: list[int] = []

    def counted(prompt: object, texts: Sequence[str]) -> list[float]:
        scored.append(len(texts))
        return slowly(prompt, texts)

    def ask(name: str) -> None:
        status, _, body = server.chat(aisp={"budget": 512, "rows": 4, "method": "best-of-n"})
        answers[name] = status, body

    threads = [threading.Thread(target=ask, args=(name,)) for name in ("first", "second")]
    with fake(counted, parallel=1) as server:
        for thread, key in zip(threads, ("running", "waiting"), strict=True):
            thread.start()
            until(lambda key=key: health(server)[key] == 1)  # type: ignore[misc]
        until(lambda: len(scored) > 2)
    for thread in threads:
        thread.join()
    first, second = (answers[name] for name in ("first", "second"))
    assert first[0] == 200 and first[1]["aisp"]["status"] == "interrupted" and first[1]["aisp"]["rollouts"] < 512
    assert second[0] == 503 and "shutting down" in second[1]["error"]["message"]


@pytest.mark.native
def test_the_command_serves_until_ctrl_c() -> None:
    command = [sys.executable, "-m", "aisp_local", "serve", "--port", "0", "--threads", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert "storyteller.gguf with story-reward at http://127.0.0.1:" in line
        port = int(line.split("127.0.0.1:")[1].split("/")[0])
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any", max_retries=0)
        answer = client.chat.completions.create(model="m", messages=STORY, max_tokens=8, extra_body=QUICK)
        assert answer.choices[0].message.content
        client.close()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) in (0, 130)


REFUSED = {
    ("--api-key", " "): "the API key is empty",
    ("--allow-origin", "page.example"): "is no origin",
    ("--allow-origin", "http://page.example/path"): "is no origin",
    ("--host", "no.such.name.invalid"): "there is no address 'no.such.name.invalid' to listen on",
    ("--host", "192.0.2.1"): "cannot listen on 192.0.2.1 port 8080",
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.items())
def test_options_that_are_refused(arguments: tuple[str, str], message: str) -> None:
    found = CliRunner().invoke(serve, list(arguments))
    assert isinstance(found.exception, InputError) and message in str(found.exception)


def test_the_command_says_what_is_wrong() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "aisp_local", "serve", "--port", port, "--threads", "1"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and f"cannot listen on 127.0.0.1 port {port}" in done.stderr


def test_the_page_needs_nothing_from_elsewhere() -> None:
    with fake() as server:
        for path, kind in (("/", "text/html"), ("/page/page.css", "text/css"), ("/page/page.js", "text/javascript")):
            status, headers, text = server.send("GET", path)
            assert status == 200 and headers["content-type"].startswith(kind)
            assert "default-src 'none'" in headers["content-security-policy"]
            assert "//" not in text.replace("http://www.w3.org/2000/svg", "").replace("// ", "")
        assert "innerHTML" not in server.send("GET", "/page/page.js")[2]
        for path in ("/page/app.py", "/page/..%2Fapp.py", "/page/"):
            assert server.send("GET", path)[0] == 404


def test_a_page_that_watches_gets_candidates_and_the_unaligned_answer() -> None:
    with fake() as server:
        more = {"budget": 8, "rows": 4, "method": "best-of-n", "events": True, "candidates": True, "baseline": True}
        seen = events(server.chat(stream=True, aisp=more)[2])
        shown = [body["candidates"] for name, body in seen if name == "aisp.iteration"]
        assert [len(rows) for rows in shown] == [4, 4] and set(shown[0][0]) == {"row", "reward", "text"}
        (result,) = [body for name, body in seen if name == "aisp.result"]
        assert set(result["baseline"]) == {"text", "reward"}


@pytest.mark.native
def test_a_client_gets_the_trace(server: Server) -> None:
    more = QUICK["aisp"] | {"trace": True, "judge_all": True}
    whole = server.chat(aisp=more, max_tokens=8, seed=5)[2]["aisp"]["trace"]
    (streamed,) = [
        body for name, body in events(server.chat(aisp=more, max_tokens=8, stream=True)[2]) if name == "aisp.trace"
    ]
    for trace in (whole, streamed):
        schema().validate(trace)
        assert trace["prompt"] == STORY and len(trace["result"]["candidates"]) == 4
        assert trace["search"]["judge_all"] and trace["reward"]["source"] == "shipped"
        # Where this machine keeps its models is no client's business.
        assert trace["result"]["model"] == "storyteller.gguf" and str(shipped.model().parent) not in json.dumps(trace)
    assert whole["search"]["seed"] == 5 and streamed["search"]["options"]["commit"] is True


def test_what_is_no_number_is_null() -> None:
    def odd(prompt: object, texts: Sequence[str]) -> list[float]:
        return [float("nan"), *[1.0] * (len(texts) - 1)]

    with fake(odd) as server:
        more = {"budget": 4, "rows": 4, "method": "best-of-n", "events": True, "candidates": True}
        data = server.chat(stream=True, aisp=more)[2]
        assert "NaN" not in data and any(
            row["reward"] is None
            for name, body in events(data)
            if name == "aisp.iteration"
            for row in body["candidates"]
        )
