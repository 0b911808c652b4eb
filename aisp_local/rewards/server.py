"""A language model behind a local HTTP server as a reward: yes or no, or a mark from 1 to 10.

It speaks ``POST /v1/chat/completions``, as llama.cpp's server, Ollama and others do. Only the standard library;
proxies of the environment are not used, redirects not followed.
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import math
import queue
import re
import socket
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt

from aisp_local.errors import RewardError, ScoreError
from aisp_local.rewards.interruption import POLL, AbandonedError, interruption
from aisp_local.rewards.rules.base import choice, flag, positive, whole
from aisp_local.rewards.text import clean, prompt_text
from aisp_local.types import Prompt

_WORST = {"yes-no": -1.0, "1-10": -9.0}
_TOKENS = {"yes-no": 4, "1-10": 8}
_LARGEST = 4 << 20  # bytes of an answer
_BACKOFF = 0.5  # seconds before the first retry, twice as many before each further one
_FIELD = re.compile(r"\{(prompt|response)\}")
_LONGEST = 86_400.0  # seconds of a time-out; a clock that overflows would end a search
_MEANT = 0.1  # the least probability of yes and no together with which a token answers
# What names the scale and is no mark; a number, but for one that is part of a word ("10-point"); one that says of how
# many it is; and the upper end of a range, which leaves the lower one.
_RANGE = re.compile(
    r"\b1(?:\s*/\s*10)?\s*(?:[-\u2013\u2014]|to\b|through\b|and\b)\s*10\b(?!\.\d)(?:\s*/\s*10\b)?", re.IGNORECASE
)
_OF_TEN = r"(?:/|\b(?:out\s+)?of\b)\s*10\b(?!\.\d)"
_NUMBER = r"(?<![\w.])-?\d+(?:\.\d+)?(?!\w|-[^\W\d]|\.\d)"
_SCALE = re.compile(_OF_TEN, re.IGNORECASE)
_MARK = re.compile(_NUMBER)
_MARK_OF_TEN = re.compile(_NUMBER + r"\s*" + _OF_TEN, re.IGNORECASE)
_UPPER_END = re.compile(r"(?<=\d)\s*(?:[-\u2013\u2014]|to\b|through\b)\s*\d+(?:\.\d+)?", re.IGNORECASE)


class _Retry(Exception):
    """A failure that another attempt may not have."""


class _Left:
    """Whether the caller has left, and what it must shut then: a thread that reads notices nothing else."""

    def __init__(self) -> None:
        self.lock, self.event = threading.Lock(), threading.Event()
        self.problem = ""  # what cost a response its score
        self._open: set[socket.socket] = set()

    @property
    def gone(self) -> bool:
        return self.event.is_set()

    def opened(self, sock: socket.socket) -> None:
        with self.lock:
            self._open.add(sock)
        if self.gone:
            _shut(sock)

    def closed(self, sock: socket.socket | None) -> None:
        with self.lock:
            self._open -= {sock}

    def go(self) -> None:
        self.event.set()
        with self.lock:
            for sock in self._open:
                _shut(sock)


class ServerReward:
    """Asks a server about each response. 0 is the best score; one for each response, in their order.

    ``prompt`` is what it is asked; ``{prompt}`` and ``{response}`` in it stand for the two. ``scale`` is

    - ``yes-no``: p - 1 (0 to -1), with p = P(yes) / (P(yes) + P(no)) from the log-probabilities of the first of its
      tokens, at the beginning or behind a sign, that is yes or no with a probability of a tenth or more; where there
      is none such, 1 for an answer that begins with yes, or has it behind a colon, and 0 for one with no there;
    - ``1-10``: the mark less 10 (0 to -9): the number before "/10" or "out of 10", or that the answer begins with, or
      else its last. One outside 1 to 10 is no mark, and the request has failed. What only names the scale ("1-10",
      "between 1 and 10") does not count.

    ``timeout``: seconds for one request, all of it, a day at most. A request that fails is repeated ``retries``
    times, after 0.5, 1, 2, ... seconds. ``on_failure``: what is left then, ``stop`` (ScoreError) or ``worst`` (the
    worst score of the scale, and one warning). The server must be this machine unless ``allow_remote``: the address
    that was connected to
    counts, not what it is called. ``parallel``: requests at a time. Raises RewardError for arguments that cannot be.
    """

    background = True
    prefix = False
    unfinished = False  # each score is a request

    def __init__(
        self,
        *,
        server: str,
        prompt: str,
        scale: str = "yes-no",
        model: str = "",
        timeout: float = 30.0,
        retries: int = 2,
        on_failure: str = "stop",
        allow_remote: bool = False,
        parallel: int = 1,
    ) -> None:
        self._scale = choice("scale", scale, tuple(_WORST))
        self._on_failure = choice("on_failure", on_failure, ("stop", "worst"))
        self._timeout = positive("timeout", timeout)
        if self._timeout > _LONGEST:
            raise RewardError(f"'timeout' is {timeout!r}; it must be at most {_LONGEST:.0f} seconds, a day")
        self._retries = whole("retries", retries, 0, 10)
        self._parallel = whole("parallel", parallel, 1, 64)
        self._allow_remote = flag("allow_remote", allow_remote)
        if not isinstance(prompt, str) or "{response}" not in prompt:
            raise RewardError(f"'prompt' is {prompt!r}; it must hold {{response}}, and may hold {{prompt}}")
        if not isinstance(model, str):
            raise RewardError(f"'model' is {model!r}; give the name by which the server knows it")
        self._prompt, self._model = clean(prompt), clean(model)
        self._url(server)
        self.name = f"server {self._host}:{self._port}"
        self._warned = False

    def _url(self, server: object) -> None:
        wrong = f"'server' is {server!r}; give an address such as \"http://127.0.0.1:8080\""
        if not isinstance(server, str):
            raise RewardError(wrong)
        try:
            parts = urlsplit(server)
            port = parts.port
        except ValueError as error:
            raise RewardError(wrong) from error
        if (
            parts.scheme not in ("http", "https")
            or not parts.hostname
            or parts.query
            or parts.fragment
            or "@" in server
        ):
            raise RewardError(wrong)
        self._secure, self._host = parts.scheme == "https", parts.hostname
        self._port = port or (443 if self._secure else 80)
        self._path = parts.path.rstrip("/").removesuffix("/v1") + "/v1/chat/completions"
        if not (self._path.isascii() and self._path.isprintable() and " " not in self._path):
            raise RewardError(wrong)
        if not self._allow_remote and self._host != "localhost" and not _is_loopback(self._host):
            raise RewardError(
                f"'server' is {server!r}, another machine, and responses would leave this one; "
                "use 127.0.0.1, or set allow_remote = true if that is meant"
            )

    def score(self, prompt: Prompt, responses: Sequence[str]) -> npt.NDArray[np.float32]:
        """Scores [n]. Raises ScoreError when the server fails and ``on_failure`` is ``stop``.

        AbandonedError within a tenth of a second once the caller's interruption is true, whatever the server does.
        """
        question, over, done = prompt_text(prompt), interruption(), queue.SimpleQueue[tuple[int, Any]]()
        asked, left = iter(enumerate(responses)), _Left()

        def work() -> None:
            while not left.gone:
                with left.lock:
                    i, response = next(asked, (-1, ""))
                if i < 0:
                    return
                try:
                    done.put((i, self._one(question, response, left)))
                except BaseException as error:  # for the thread that waits
                    done.put((i, error))

        found = np.zeros(len(responses), np.float32)
        try:
            # Daemons: one that hangs where nothing can end it (in a look-up of a name) must not keep the program.
            for _ in range(min(self._parallel, len(responses))):
                threading.Thread(target=work, name="aisp-local-server", daemon=True).start()
            for _ in responses:
                i, value = self._next(done, over)
                if isinstance(value, BaseException):
                    raise value
                found[i] = value
                if left.problem and not self._warned:
                    self._warned = True
                    warnings.warn(f"{left.problem}; responses that it fails on get the worst score", stacklevel=2)
        finally:
            left.go()
        return found

    def _next(self, done: queue.SimpleQueue[tuple[int, Any]], over: Callable[[], bool]) -> tuple[int, Any]:
        while True:
            try:
                return done.get(timeout=POLL)
            except queue.Empty:
                if over():
                    raise AbandonedError(f"{self.name} was still asked when the search was interrupted") from None

    def _one(self, question: str, response: str, left: _Left) -> float:
        fields = {"prompt": clean(question), "response": clean(response)}
        # In one pass, so that a response with {prompt} in it stays as it is.
        text = _FIELD.sub(lambda match: fields[match[1]], self._prompt)
        body = json.dumps(self._request(text)).encode()
        problem = ""
        for attempt in range(self._retries + 1):
            if attempt:
                left.event.wait(_BACKOFF * 2 ** (attempt - 1))
            if left.gone:
                raise AbandonedError("nobody waits for the answer")
            try:
                return self._marked(_json(self._post(body, left)))
            except _Retry as error:
                problem = str(error)
            except ScoreError as error:
                problem = str(error)
                break
        sentence = f"the server {self._host}:{self._port} {problem}"
        if self._on_failure == "stop":
            raise ScoreError(f'{sentence}; check it, or set on_failure = "worst"')
        left.problem = sentence
        return _WORST[self._scale]

    def _request(self, text: str) -> dict[str, Any]:
        request: dict[str, Any] = {
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": _TOKENS[self._scale],
            "stream": False,
        }
        if self._model:
            request["model"] = self._model
        if self._scale == "yes-no":
            request |= {"logprobs": True, "top_logprobs": 20}
        return request

    def _post(self, body: bytes, left: _Left) -> bytes:
        """The body of the answer. Raises _Retry, or ScoreError for what would fail again."""
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=self._timeout)
        late = threading.Event()
        sock: socket.socket | None = None

        def expire() -> None:
            """A socket's own time-out begins anew with every byte."""
            late.set()
            _shut(sock)

        timer = threading.Timer(self._timeout, expire)
        timer.daemon = True
        timer.start()
        try:
            connection.connect()
            sock = connection.sock
            left.opened(sock)
            peer = sock.getpeername()[0]
            if not self._allow_remote and not _is_loopback(peer):
                raise ScoreError(f"is at {peer}, another machine, and allow_remote is not set")
            connection.request("POST", self._path, body, {"Content-Type": "application/json", "Connection": "close"})
            answer = connection.getresponse()
            data = answer.read(_LARGEST + 1)
            if late.is_set():
                raise _Retry(f"did not answer within {self._timeout:g} seconds")
            if answer.length and len(data) <= _LARGEST:
                raise _Retry("closed the connection in the middle of its answer")
        except (OSError, http.client.HTTPException) as error:
            if late.is_set() or isinstance(error, TimeoutError):
                raise _Retry(f"did not answer within {self._timeout:g} seconds") from error
            said = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise _Retry(f"cannot be used ({said})") from error
        finally:
            timer.cancel()
            left.closed(sock)
            connection.close()
        if len(data) > _LARGEST:
            raise ScoreError(f"sent more than {_LARGEST >> 20} MiB")
        if answer.status != 200:
            said = " ".join(data[:200].decode("utf-8", "replace").split())
            problem = f"answered {answer.status} {answer.reason}" + (f": {said}" if said else "")
            raise (_Retry if answer.status >= 500 or answer.status in (408, 429) else ScoreError)(problem)
        return data

    def _marked(self, answer: Mapping[str, Any]) -> float:
        """The score that an answer stands for. Raises _Retry."""
        try:
            first = answer["choices"][0]
            text = first["message"]["content"] or ""
            logprobs = first.get("logprobs")
            tokens = (logprobs or {}).get("content") or []
            tops = [
                [(str(top["token"]), float(top["logprob"])) for top in token.get("top_logprobs") or []]
                for token in tokens
            ]
        except (KeyError, IndexError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise _Retry("sent an answer without choices[0].message.content") from error
        if self._scale == "1-10":
            mark = _mark(str(text))
            if mark is None or not 1 <= mark <= 10:
                raise _Retry(f"gave no mark from 1 to 10, but {str(text)[:40]!r}")
            return mark - 10.0
        fresh = True  # a sentence begins here
        for top in tops:
            yes, no = (_mass(top, word) for word in ("yes", "no"))
            if fresh and yes + no >= _MEANT:
                return yes / (yes + no) - 1.0
            likeliest = max(top, key=lambda pair: pair[1], default=("x", 0.0))[0]
            fresh = not re.search(r"\w\Z", likeliest)
        word = re.search(r"(?:\A|:)\W*(yes|no)\b", str(text), re.IGNORECASE)
        if word is None:
            raise _Retry(f"said neither yes nor no, but {str(text)[:40]!r}")
        return 0.0 if word[1].lower() == "yes" else -1.0


def _mark(text: str) -> float | None:
    """The number in an answer that is its mark, of whatever size."""
    text = _RANGE.sub(" ", text)
    if found := _MARK_OF_TEN.search(text):
        return float(_MARK.match(text, found.start())[0])  # type: ignore[index]  # it begins with one
    text = _UPPER_END.sub("", _SCALE.sub(" ", text))
    numbers = list(_MARK.finditer(text))
    if not numbers:
        return None
    first = numbers[0]
    return float((first if not re.search(r"\w", text[: first.start()]) else numbers[-1])[0])


def _shut(sock: socket.socket | None) -> None:
    if sock is not None:
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)


def _json(data: bytes) -> Mapping[str, Any]:
    try:
        answer = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _Retry("sent something that is not JSON") from error
    if not isinstance(answer, dict):
        raise _Retry("sent JSON that is not an object")
    return answer


def _mass(top: Sequence[tuple[str, float]], word: str) -> float:
    """The probability of a word among the likeliest tokens, however it is written."""
    return math.fsum(
        math.exp(min(logprob, 0.0)) for token, logprob in top if token.strip(" \n\t\"'*.,").lower() == word
    )


def _is_loopback(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)
