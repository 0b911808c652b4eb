"""The HTTP side: routes, limits, server-sent events."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from aisp_local.api import Aligner
from aisp_local.defaults import DEFAULT_MAX_TOKENS, DEFAULT_TOGETHER
from aisp_local.engine import LlamaEngine
from aisp_local.finite import finite
from aisp_local.server.desk import LOGPROBS, Desk, Event, Job, as_error
from aisp_local.server.logprobs import of_chat, of_completion
from aisp_local.server.request import KEY, ApiError, Ask, parse
from aisp_local.types import Candidate, Result

_PAGE = {"index.html": "text/html", "page.css": "text/css"} | {
    f"{name}.js": "text/javascript" for name in ("page", "draw", "runs", "compare")
}
_PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_FINISH = {"stop": "stop", "length": "length"}
_OBJECT = {True: "chat.completion", False: "text_completion"}
_QUIET = 15.0  # seconds after which a stream says that it lives: proxies close what is silent for a minute or so


@dataclass(frozen=True)
class Settings:
    """``hosts``: names that the server may be called by, against DNS rebinding; ``origins``: pages that may call it."""

    api_key: str | None = None
    hosts: tuple[str, ...] = ("localhost", "127.0.0.1", "::1")
    origins: tuple[str, ...] = ()
    parallel: int = DEFAULT_TOGETHER
    waiting: int = 64
    max_tokens: int = DEFAULT_MAX_TOKENS
    max_rollouts: int = 512
    max_body: int = 1 << 20
    body_seconds: float = 20.0


def make_app(aligner: Aligner, settings: Settings | None = None) -> Starlette:
    """The application; closing it closes what it started, not the aligner."""
    server = _Server(aligner, settings or Settings())

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await asyncio.to_thread(server.desk.close)

    routes = [
        Route("/", server.page),
        Route("/page/{name}", server.page),
        Route("/health", server.health),
        Route("/metrics", server.metrics),
        Route("/v1/models", server.models),
        Route("/v1/models/{name:path}", server.model),
        Route("/v1/chat/completions", server.chat, methods=["POST"]),
        Route("/v1/chat/completions/{id}/cancel", server.cancel, methods=["POST"]),
        Route("/v1/completions", server.complete, methods=["POST"]),
        Route("/v1/completions/{id}/cancel", server.cancel, methods=["POST"]),
    ]
    handlers: dict[Any, Any] = {ApiError: _refused, HTTPException: _http, Exception: _failed}
    # So that a page of another origin may read what it is answered.
    cors = Middleware(
        CORSMiddleware,
        allow_origins=server.settings.origins,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=["X-Request-Id", "Retry-After"],
    )
    middleware = [cors] if server.settings.origins else []
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers, middleware=middleware)
    app.router.redirect_slashes = False  # to where the request's host says, which nobody has checked
    app.state.desk = server.desk
    return app


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body(), error.status, headers)


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = {404: f"{request.url.path} is not here", 405: f"{request.method} is not allowed here"}
    return JSONResponse(
        ApiError(error.status_code, what.get(error.status_code, error.detail)).body(), error.status_code
    )


async def _failed(request: Request, error: Exception) -> Response:
    return JSONResponse(ApiError(500, "the server failed", kind="server_error").body(), 500)


class _Server:
    def __init__(self, aligner: Aligner, settings: Settings) -> None:
        self.aligner, self.settings = aligner, settings
        self.name = Path(aligner.model_name or "model").stem
        self.desk = Desk(aligner, parallel=settings.parallel, waiting=settings.waiting, max_tokens=settings.max_tokens)
        self.started = int(time.time())
        self.jobs: dict[str, Job] = {}  # that wait or are searched for, by the id of their answer

    # What may call.

    def _check(self, request: Request, open_to_all: bool = False) -> None:
        host = request.headers.get("host", "")
        name = host[1:].split("]")[0] if host.startswith("[") else host.rsplit(":", 1)[0] if ":" in host else host
        if "*" not in self.settings.hosts and name.lower() not in self.settings.hosts:
            raise ApiError(403, f"the host {host!r} is not this server's; start it with --allow-host", code="host")
        origin = request.headers.get("origin")
        if origin is not None and not {"*", origin.lower()} & set(self.settings.origins):
            allowed = {f"{scheme}://{host}" for scheme in ("http", "https")}
            if origin not in allowed:
                raise ApiError(403, f"pages of {origin!r} may not call this server", code="origin")
        if self.settings.api_key is not None and not open_to_all:
            scheme, _, given = request.headers.get("authorization", "").partition(" ")
            # What is not ASCII comes as its bytes.
            same = hmac.compare_digest(given.strip().encode("latin-1"), self.settings.api_key.encode())
            if scheme.lower() != "bearer" or not same:
                raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")

    async def _body(self, request: Request) -> bytes:
        """The body, of bounded size and time."""
        limit, data = self.settings.max_body, bytearray()
        try:
            async with asyncio.timeout(self.settings.body_seconds):
                async for part in request.stream():
                    data += part
                    if len(data) > limit:
                        raise ApiError(413, f"the body is larger than {limit} bytes", code="request_too_large")
        except TimeoutError:
            raise ApiError(408, f"the body took longer than {self.settings.body_seconds:g} s") from None
        except ClientDisconnect:
            raise ApiError(400, "the client went away") from None
        return bytes(data)

    # Routes.

    async def page(self, request: Request) -> Response:
        self._check(request, open_to_all=True)
        name = request.path_params.get("name", "index.html")
        if name not in _PAGE:
            raise HTTPException(404)
        data = resources.files("aisp_local.server").joinpath("page", name).read_bytes()
        return Response(data, media_type=_PAGE[name], headers=_PAGE_HEADERS)

    async def health(self, request: Request) -> Response:
        self._check(request, open_to_all=True)
        return JSONResponse(
            {"status": "ok", "busy": self.desk.busy > 0, "running": self.desk.busy, "waiting": self.desk.waiting}
        )

    async def metrics(self, request: Request) -> Response:
        self._check(request)
        counts = asdict(self.desk.counts)
        lines = [f"# TYPE aisp_{name}_total counter\naisp_{name}_total {value}" for name, value in counts.items()]
        lines.append(f"# TYPE aisp_waiting gauge\naisp_waiting {self.desk.waiting}")
        lines.append(f"# TYPE aisp_busy gauge\naisp_busy {self.desk.busy}")
        return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")

    def _card(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self.started, "owned_by": "aisp-local"}

    async def models(self, request: Request) -> Response:
        self._check(request)
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        self._check(request)
        if request.path_params["name"] != self.name:
            name = request.path_params["name"]
            raise ApiError(404, f"the model {name!r} is not here; there is {self.name}", code="model_not_found")
        return JSONResponse(self._card())

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, chat=True)

    async def complete(self, request: Request) -> Response:
        return await self._answer(request, chat=False)

    async def _answer(self, request: Request, *, chat: bool) -> Response:
        self._check(request)
        # A megabyte takes its time; the others are served meanwhile.
        ask, room = await asyncio.to_thread(self._read, await self._body(request), chat)
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def put(event: Event) -> None:
            try:
                loop.call_soon_threadsafe(events.put_nowait, event)
            except RuntimeError:  # the server's loop is over
                job.gone.set()

        job, name = Job(ask, room, put), f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex[:24]}"
        self.desk.submit(job)
        self.jobs[name] = job
        watching = asyncio.create_task(self._watch(request, name))
        head = {
            "id": name,
            "object": _OBJECT[chat],
            "created": int(time.time()),
            "model": self.name,
        }
        headers = {"X-Request-Id": name, "Cache-Control": "no-store"}
        told = self._events(name, watching, events)
        if ask.stream:
            return StreamingResponse(self._stream(ask, told, head), media_type="text/event-stream", headers=headers)
        async for kind, value in told:
            if kind == "done":
                return JSONResponse(finite(self._whole(ask, head, value)), headers=headers)
            if kind == "failed":
                raise as_error(value)
        return Response(status_code=499)  # nobody is there to read it

    def _read(self, data: bytes, chat: bool) -> tuple[Ask, int]:
        ask = parse(data, chat=chat, limit=self.settings.max_rollouts)
        return ask, self.desk.room(ask)

    async def cancel(self, request: Request) -> Response:
        """The search ends with its best so far, which its own request is answered with."""
        self._check(request)
        name = request.path_params["id"]
        job = self.jobs.get(name)
        if job is None:
            raise ApiError(404, f"no search for {name!r} waits or runs; it may be over", code="not_found")
        self.desk.cancel(job)
        return JSONResponse({"id": name, "object": _OBJECT[job.ask.chat], "status": "cancelling"})

    async def _watch(self, request: Request, name: str) -> None:
        """A client that goes away cancels its search."""
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self._leave(name)

    def _leave(self, name: str) -> None:
        if (job := self.jobs.pop(name, None)) is not None:
            self.desk.cancel(job, gone=True)

    async def _events(
        self, name: str, watching: asyncio.Task[None], events: asyncio.Queue[Event]
    ) -> AsyncIterator[Event]:
        """Until the last one, with which the search is over; ``waits`` where none came for a while."""
        event: Event = ("waits", None)
        try:
            while event[0] not in ("done", "failed"):
                try:
                    event = await asyncio.wait_for(events.get(), _QUIET)
                except TimeoutError:
                    event = ("waits", None)
                if event[0] not in ("done", "failed"):
                    yield event
        finally:
            watching.cancel()
            self._leave(name)
        yield event

    async def _stream(self, ask: Ask, told: AsyncIterator[Event], head: Mapping[str, Any]) -> AsyncIterator[str]:
        head = {**head, "object": "chat.completion.chunk" if ask.chat else "text_completion"}
        sent = ""

        def chunk(
            index: int,
            text: str | None,
            finish: str | None = None,
            role: bool = False,
            logprobs: dict[str, Any] | None = None,
        ) -> str:
            if ask.chat:
                delta = {"role": "assistant"} if role else {}
                choice = {"index": index, "delta": delta | ({} if text is None else {"content": text})}
            else:
                choice = {"index": index, "text": text or ""}
            choice |= {"logprobs": logprobs, "finish_reason": finish}
            return _event({**head, "choices": [choice]})

        if ask.chat:
            yield chunk(0, "", role=True)
        async for kind, value in told:
            if kind == "waits":
                yield ": the search goes on\n\n"  # a comment, which clients pass over
            elif kind == "settled":
                yield chunk(0, value[len(sent) :])
                sent = value
            elif kind in ("iteration", "progress"):
                yield _event(value, name=f"{KEY}.{kind}")
            elif kind == "failed":
                yield _event(as_error(value).body())
                return
            else:
                for index, candidate in enumerate(value.distinct(ask.n)):
                    if ask.chat and index:
                        yield chunk(index, "", role=True)
                    text = candidate.text
                    # What was cut short may end in another answer than the one that settled: it keeps what was sent.
                    rest = text[len(sent) :] if text.startswith(sent) else ""
                    if rest:
                        yield chunk(index, rest, logprobs=_logprobs(ask, index, value))
                    yield chunk(index, None, _FINISH.get(candidate.finish_reason, "length"))
                if ask.include_usage:
                    yield _event({**head, "choices": [], "usage": self._usage(ask, value)})
                if ask.events:
                    yield _event(_search(value), name=f"{KEY}.result")
                if ask.trace:
                    yield _event(self._trace(value), name=f"{KEY}.trace")
                yield "data: [DONE]\n\n"

    # Answers.

    def _whole(self, ask: Ask, head: Mapping[str, Any], result: Result) -> dict[str, Any]:
        choices = [
            self._choice(ask, index, candidate, _logprobs(ask, index, result))
            for index, candidate in enumerate(result.distinct(ask.n))
        ]
        search = _search(result) | ({"trace": self._trace(result)} if ask.trace else {})
        return {**head, "choices": choices, "usage": self._usage(ask, result), KEY: search}

    def _trace(self, result: Result) -> dict[str, Any]:
        """Without this machine's folders, which are no client's business."""
        return dict(self.aligner.trace(result, paths=False).content)

    def _choice(self, ask: Ask, index: int, candidate: Candidate, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        said: dict[str, Any] = {"text": candidate.text}
        if ask.chat:
            said = {"message": {"role": "assistant", "content": candidate.text, "refusal": None}}
        finish = _FINISH.get(candidate.finish_reason, "length")
        return {
            "index": index,
            **said,
            "logprobs": logprobs,
            "finish_reason": finish,
            KEY: {"reward": candidate.reward},
        }

    def _usage(self, ask: Ask, result: Result) -> dict[str, Any]:
        """The answer's tokens as OpenAI counts them; those of the whole search beside them."""
        engine = self.aligner.engine
        prompt = len(engine.tokens(ask.prompt)) if isinstance(engine, LlamaEngine) else 0
        answer = sum(candidate.n_tokens for candidate in result.distinct(ask.n))
        return {
            "prompt_tokens": prompt,
            "completion_tokens": answer,
            "total_tokens": prompt + answer,
            "search_tokens": result.n_tokens,
        }


def _logprobs(ask: Ask, index: int, result: Result) -> dict[str, Any] | None:
    if LOGPROBS not in result.extra:
        return None
    return (of_chat if ask.chat else of_completion)(result.extra[LOGPROBS][index])


def _search(result: Result) -> dict[str, Any]:
    """What a client may want to know of the search."""
    return {
        "reward": result.reward,
        "judge": result.judge,
        "method": result.method,
        "status": result.status,
        "rollouts": result.rollouts,
        "iterations": len(result.iterations),
        "seconds": result.seconds,
    } | (
        {}
        if result.baseline is None
        else {"baseline": {"text": result.baseline.text, "reward": result.baseline.reward}}
    )


def _event(content: Mapping[str, Any], name: str | None = None) -> str:
    """One server-sent event. JSON has no line breaks, so that the text cannot end it."""
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {json.dumps(finite(dict(content)), ensure_ascii=False, allow_nan=False)}\n\n"
