"""The server reward against servers of this machine, most of which misbehave."""

from __future__ import annotations

import json
import math
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from aisp_local import Aligner
from aisp_local.errors import RewardError, ScoreError
from aisp_local.rewards import Composite, Part, ServerReward, server
from aisp_local.rewards.function import CallableReward
from aisp_local.rewards.rules import Length
from aisp_local.testing import FakeEngine

Behave = Callable[[BaseHTTPRequestHandler, dict[str, Any], int], None]
PROMPT = "Question: {prompt}\nAnswer: {response}\nIs it kind? yes or no"


class Server:
    """Answers as ``behave(handler, request, number of the request from 0)`` says."""

    def __init__(self) -> None:
        self.behave: Behave = say("yes")
        self.requests: list[dict[str, Any]] = []
        self.paths: list[str] = []
        outer = self
        lock = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(outer.requests)
                    outer.requests.append(request)
                    outer.paths.append(self.path)
                try:
                    outer.behave(self, request, number)
                except OSError:  # the client has gone
                    self.close_connection = True

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.http.block_on_close = False
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


def send(handler: BaseHTTPRequestHandler, body: bytes, status: int = 200) -> None:
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def answer(text: str | None, tops: list[dict[str, float]] | None = None) -> bytes:
    choice: dict[str, Any] = {"message": {"role": "assistant", "content": text}}
    if tops is not None:
        choice["logprobs"] = {
            "content": [
                {"token": "x", "top_logprobs": [{"token": token, "logprob": math.log(p)} for token, p in top.items()]}
                for top in tops
            ]
        }
    return json.dumps({"choices": [choice]}).encode()


def say(text: str | None, tops: list[dict[str, float]] | None = None) -> Behave:
    return lambda handler, request, number: send(handler, answer(text, tops))


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(server, "_BACKOFF", 0.01)
    made = Server()
    yield made
    made.close()


def grader(live: Server, **options: Any) -> ServerReward:
    return ServerReward(**{"server": live.url, "prompt": PROMPT, "timeout": 5.0, **options})


def test_yes_and_no_by_log_probabilities(live: Server) -> None:
    live.behave = say("Yes", [{"\n": 0.9}, {"Yes": 0.5, " yes": 0.1, "no": 0.2, "maybe": 0.1}])
    reward = grader(live, model="tiny")
    assert reward.score([{"role": "user", "content": "Q?"}], ["{prompt}"])[0] == pytest.approx(0.6 / 0.8 - 1)
    (request,) = live.requests
    assert request["messages"] == [{"role": "user", "content": "Question: Q?\nAnswer: {prompt}\nIs it kind? yes or no"}]
    assert request["model"] == "tiny" and request["temperature"] == 0 and request["logprobs"] is True
    assert live.paths == ["/v1/chat/completions"]


@pytest.mark.parametrize(("text", "score"), [("Yes.", 0.0), (" **no**, it is not", -1.0), ("YES", 0.0)])
def test_yes_and_no_without_log_probabilities(live: Server, text: str, score: float) -> None:
    live.behave = say(text)
    assert grader(live).score("q", ["r"]).tolist() == [score]


MARKS = {
    "7": -3.0,
    "Score: 10/10": 0.0,
    "**1**": -9.0,
    "8.5 of 10": -1.5,
    "1/10": -9.0,
    "3 out of 10.": -7.0,
    "Out of 10, I would say 4": -6.0,
    "Rating (1-10): 7": -3.0,
    "Rating (1 \u2013 10): **7**": -3.0,
    "From 1 to 10, this is a 2 / 10": -8.0,
    "On a 10-point scale: 3": -7.0,
    "7-8": -3.0,
    "7 to 8": -3.0,
    "On a scale between 1 and 10: 8": -2.0,
    "1 through 10: 9": -1.0,
    "(1/10 to 10/10) 9": -1.0,
    "Response 2: 9": -1.0,
    "Step 1: I rate it 9": -1.0,
    "9 / 10, with 2 flaws": -1.0,
    "8, for it has 2 flaws": -2.0,
    "Flaw 1 costs 3: 6/10": -4.0,
    "Mark 8\u202f/\u202f10": -2.0,
}


UNMEANT = [{"It": 0.98, "No": 1.7e-5}]


@pytest.mark.parametrize(
    ("text", "tops", "score"),
    [
        ("It is kind: yes", UNMEANT, 0.0),
        ("Answer: no", [{"Answer": 0.97, "No": 0.01, "Yes": 0.02}, {":": 0.99}, {" no": 0.6, " yes": 0.2}], -0.75),
        ("Yes", [{"Y": 0.9, "no": 0.001}, {"es": 1.0}], 0.0),
        ("There: yes", [{"There": 0.9}, {" no": 0.9, " yes": 0.05}], 0.0),
        ("no", [{"no": 0.06, "yes": 0.05}], 0.05 / 0.11 - 1),
        ("no", [{"no": 0.05, "yes": 0.04}], -1.0),
    ],
)
def test_a_trace_of_a_word_decides_nothing(live: Server, text: str, tops: list[dict[str, float]], score: float) -> None:
    live.behave = say(text, tops)
    assert grader(live).score("q", ["r"])[0] == pytest.approx(score)


def test_a_trace_of_a_word_is_no_answer(live: Server) -> None:
    live.behave = say("It is kind", UNMEANT)
    with pytest.raises(ScoreError, match="neither yes nor no"):
        grader(live, retries=0).score("q", ["r"])


@pytest.mark.parametrize(("text", "score"), MARKS.items())
def test_marks(live: Server, text: str, score: float) -> None:
    live.behave = say(text)
    assert grader(live, scale="1-10").score("q", ["r"]).tolist() == [score]
    assert "logprobs" not in live.requests[0]


@pytest.mark.parametrize(
    "text",
    [
        "0/10",
        "0 out of 10",
        "0.5/10",
        "11/10",
        "-3",
        "100",
        "10.5",
        "1-10",
        "out of 10",
        "none, not even 0 of 10",
        "Response 2: 0",
        "Response 2: 11",
        "0, for it has 3 flaws",
        "9" * 5000,
    ],
)
def test_a_number_outside_the_scale_is_no_mark(live: Server, text: str) -> None:
    """Above all not the best one: the 10 of "0/10"."""
    live.behave = say(text)
    with pytest.raises(ScoreError, match="no mark from 1 to 10"):
        grader(live, scale="1-10", retries=0).score("q", ["r"])
    with pytest.warns(UserWarning, match="no mark from 1 to 10"):
        assert grader(live, scale="1-10", retries=0, on_failure="worst").score("q", ["r"]).tolist() == [-9.0]


def test_order_is_kept_with_requests_in_parallel(live: Server) -> None:
    def behave(handler: BaseHTTPRequestHandler, request: dict[str, Any], number: int) -> None:
        mark = request["messages"][0]["content"]
        time.sleep(0.05 * (9 - int(mark)))
        send(handler, answer(mark))

    live.behave = behave
    reward = grader(live, prompt="{response}", scale="1-10", parallel=4)
    assert reward.score("q", [str(i) for i in range(1, 9)]).tolist() == [float(i - 10) for i in range(1, 9)]
    assert reward.score("q", []).shape == (0,)


def slow(handler: BaseHTTPRequestHandler, request: dict[str, Any], number: int) -> None:
    time.sleep(3)


def drip(handler: BaseHTTPRequestHandler, request: dict[str, Any], number: int) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    for _ in range(60):
        handler.wfile.write(b" ")
        time.sleep(0.05)


def drip_headers(handler: BaseHTTPRequestHandler, request: dict[str, Any], number: int) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
    for _ in range(60):
        handler.wfile.write(b"x")
        time.sleep(0.05)


def hang_up(handler: BaseHTTPRequestHandler, request: dict[str, Any], number: int) -> None:
    handler.close_connection = True


def half(handler: BaseHTTPRequestHandler, request: dict[str, Any], number: int) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices"')
    handler.close_connection = True


def not_http(handler: BaseHTTPRequestHandler, request: dict[str, Any], number: int) -> None:
    handler.wfile.write(b"\x00\x01garbage\r\n\r\n")
    handler.close_connection = True


def status(code: int) -> Behave:
    return lambda handler, request, number: send(handler, b"no model is loaded", code)


# A logarithm of 400 digits.
HUGE = answer("yes", [{"yes": 1.0}]).replace(b'"logprob": 0.0', b'"logprob": -1' + b"0" * 400)

MISBEHAVE: dict[str, tuple[Behave, str, int]] = {
    "slow": (slow, "did not answer within 0.5 seconds", 2),
    "drips": (drip, "did not answer within 0.5 seconds", 2),
    "drips headers": (drip_headers, "did not answer within 0.5 seconds", 2),
    "hangs up": (hang_up, "cannot be used", 2),
    "half an answer": (half, "in the middle of its answer", 2),
    "no HTTP": (not_http, "cannot be used", 2),
    "500": (status(500), "answered 500 Internal Server Error: no model is loaded", 2),
    "404": (status(404), "answered 404", 1),
    "redirect": (status(302), "answered 302", 1),
    "no JSON": (lambda h, r, n: send(h, b"\xff<html>"), "not JSON", 2),
    "a list": (lambda h, r, n: send(h, b"[]"), "not an object", 2),
    "no choices": (lambda h, r, n: send(h, b'{"choices": []}'), "without choices", 2),
    "deep": (lambda h, r, n: send(h, b"[" * 100_000), "not JSON", 2),
    "too much": (lambda h, r, n: send(h, b" " * (5 << 20)), "more than 4 MiB", 1),
    "no probability": (lambda h, r, n: send(h, HUGE), "without choices", 2),
    "undecided": (say("perhaps"), "neither yes nor no, but 'perhaps'", 2),
    "says nothing": (say(None), "neither yes nor no", 2),
}


@pytest.mark.parametrize("name", MISBEHAVE)
def test_servers_that_misbehave(live: Server, name: str) -> None:
    live.behave, expected, requests = MISBEHAVE[name]
    began = time.monotonic()
    with pytest.raises(ScoreError, match=expected):
        grader(live, timeout=0.5, retries=1).score("q", ["r"])
    assert time.monotonic() - began < 2.5
    assert len(live.requests) == requests
    with pytest.warns(UserWarning, match="get the worst score"):
        assert grader(live, timeout=0.5, retries=0, on_failure="worst").score("q", ["a", "b"]).tolist() == [-1, -1]


def hang_after(answers: int) -> Behave:
    """Good answers, then none, on a connection that stays open."""

    def behave(handler: BaseHTTPRequestHandler, request: dict[str, Any], number: int) -> None:
        if number >= answers:
            time.sleep(20)
        send(handler, answer("yes", [{"yes": 0.5 + number / 100, "no": 0.1}]))

    return behave


def hung(live: Server, **options: Any) -> ServerReward:
    return grader(live, timeout=60.0, on_failure="worst", **options)


class Stop:
    """True some time after the server was asked for the given time; notes when."""

    def __init__(self, live: Server, requests: int) -> None:
        self.live, self.requests, self.since = live, requests, math.inf

    def __call__(self) -> bool:
        if len(self.live.requests) >= self.requests and self.since == math.inf:
            self.since = time.monotonic()
        return self.since < math.inf


def searched(reward: Any, stop: Any, judge: Any = None, **options: Any) -> Any:
    settings: dict[str, Any] = {"method": "best-of-n", "budget": 400, "n": 4, "max_tokens": 10} | options
    return Aligner(FakeEngine(), reward, judge=judge).generate("p", stop=stop, **settings)


@pytest.mark.parametrize("kind", ["alone", "parallel", "part", "part in the foreground"])
def test_a_search_is_stopped_while_the_server_hangs(live: Server, kind: str) -> None:
    live.behave = hang_after(6)
    reward: Any = hung(live, parallel=3 if kind == "parallel" else 1)
    if "part" in kind:
        other = (
            CallableReward(lambda prompt, responses: [0.0] * len(responses))
            if "foreground" in kind
            else Length(words=[0, 99])
        )
        reward = Composite([reward, other])
    stop = Stop(live, 7)
    result = searched(reward, stop)
    assert time.monotonic() - stop.since < 1.0
    assert result.status == "interrupted" and result.iterations[-1].iteration == 1
    assert result.rollouts == 4 and result.reward == max(c.reward for c in result.candidates)
    live.behave = say("yes")  # and the reward goes on
    assert reward.score("q", ["r"])[0] == 0.0


def test_stopped_before_any_score(live: Server) -> None:
    live.behave = hang_after(0)
    stop = Stop(live, 1)
    with pytest.raises(KeyboardInterrupt):
        searched(hung(live), stop)
    assert time.monotonic() - stop.since < 1.0


@pytest.mark.parametrize("foreground", [False, True])
def test_a_keyboard_interrupt_while_the_server_hangs(live: Server, foreground: bool) -> None:
    live.behave = hang_after(6)
    reward: Any = hung(live)
    if foreground:
        reward = Composite([reward, CallableReward(lambda prompt, responses: [0.0] * len(responses))])
    since: list[float] = []

    def press() -> None:
        while len(live.requests) < 7:
            time.sleep(0.01)
        since.append(time.monotonic())
        signal.raise_signal(signal.SIGINT)

    presser = threading.Thread(target=press)
    # A shell that starts this in the background has SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        presser.start()
        result = searched(reward, None)
        assert time.monotonic() - since[0] < 1.0
        presser.join()
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.status == "interrupted" and result.rollouts == 4


def test_a_calibration_and_a_judge_that_hang(live: Server) -> None:
    live.behave = hang_after(0)
    stop = Stop(live, 1)
    with pytest.raises(KeyboardInterrupt):
        searched(Composite([Part(hung(live), normalise=True)]), stop)
    assert time.monotonic() - stop.since < 1.0
    stop = Stop(live, len(live.requests) + 1)
    with pytest.warns(UserWarning, match="the judge 'server .*' gave no scores: .* was interrupted"):
        result = searched(Length(words=[0, 99]), stop, hung(live), budget=8)
    assert time.monotonic() - stop.since < 1.0
    assert result.status == "complete" and result.judge is None


def test_a_healthy_server_has_time_to_answer(live: Server) -> None:
    """What is asked when the search stops still counts if the answer comes soon."""

    def behave(handler: BaseHTTPRequestHandler, request: dict[str, Any], number: int) -> None:
        time.sleep(0.05)
        send(handler, answer("yes"))

    live.behave = behave
    result = searched(hung(live), Stop(live, 1))
    assert result.status == "interrupted" and result.rollouts >= 4


@pytest.mark.native
def test_the_command_ends_with_its_best_answer(live: Server, tmp_path: Path) -> None:
    live.behave = hang_after(20)
    prompt = PROMPT.replace("\n", " ")
    recipe = tmp_path / "grader.toml"
    recipe.write_text(
        f'format = 1\n[[part]]\nserver = "{live.url}"\nprompt = "{prompt}"\ntimeout = 60\non_failure = "worst"\n'
    )
    command = ["generate", "Tell me a story.", "-r", str(recipe), "--budget", "64", "--max-tokens", "12", "--json"]
    with subprocess.Popen(
        [str(Path(sys.executable).with_name("aisp-local")), *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as run:
        try:
            while len(live.requests) < 21 and run.poll() is None:
                time.sleep(0.02)
            time.sleep(0.2)
            began = time.monotonic()
            run.send_signal(signal.SIGINT)
            out, err = run.communicate(timeout=30)
        finally:
            run.kill()
    assert run.returncode == 0, err
    assert json.loads(out)["status"] == "interrupted"
    assert time.monotonic() - began < 3  # the exit of Python and llama.cpp included, on a busy machine


def test_a_retry_helps(live: Server) -> None:
    def behave(handler: BaseHTTPRequestHandler, request: dict[str, Any], number: int) -> None:
        if number < 2:
            send(handler, b"busy", (503, 429)[number])
        else:
            send(handler, answer("yes"))

    live.behave = behave
    assert grader(live, retries=2).score("q", ["r"]).tolist() == [0.0]
    assert len(live.requests) == 3


def test_nobody_listens() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    with pytest.raises(ScoreError, match="cannot be used .*refused"):
        ServerReward(server=url, prompt=PROMPT, retries=0).score("q", ["r"])


def test_proxies_of_the_environment_are_not_used(live: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    assert grader(live).score("q", ["r"]).tolist() == [0.0]


def test_texts_that_are_no_unicode(live: Server) -> None:
    assert grader(live).score("q\ud800", ["r\udfff"]).tolist() == [0.0]
    assert "\ud800" not in live.requests[0]["messages"][0]["content"]


@pytest.mark.parametrize(
    "url",
    [
        "http://192.168.0.7:8080",
        "http://example.org",
        "http://0.0.0.0:1",
        "http://[2001:db8::1]:1",
        "http://2130706433",
    ],
)
def test_other_machines_are_refused(url: str) -> None:
    with pytest.raises(RewardError, match="another machine.*allow_remote = true"):
        ServerReward(server=url, prompt=PROMPT)
    assert ServerReward(server=url, prompt=PROMPT, allow_remote=True).name.startswith("server ")


def test_a_name_counts_for_what_it_resolves_to(live: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    port = live.url.rpartition(":")[2]
    reward = ServerReward(server=f"http://localhost:{port}", prompt=PROMPT)
    assert reward.score("q", ["r"]).tolist() == [0.0]
    monkeypatch.setattr(server, "_is_loopback", lambda host: False)
    with pytest.raises(ScoreError, match="another machine"):
        reward.score("q", ["r"])
    assert len(live.requests) == 1


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8080", "ftp://127.0.0.1", "http://", "http://127.0.0.1:x", "http://a@[::1]", 3]
)
def test_addresses_that_are_none(url: Any) -> None:
    with pytest.raises(RewardError, match="'server'"):
        ServerReward(server=url, prompt=PROMPT)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"prompt": "no field"}, "'prompt'"),
        ({"timeout": 0}, "'timeout'"),
        ({"timeout": 1e10}, "'timeout' is 10000000000.0; it must be at most 86400 seconds"),
        ({"retries": -1}, "'retries'"),
        ({"on_failure": "ignore"}, "'on_failure'"),
        ({"scale": "1-5"}, "'scale'"),
        ({"allow_remote": "yes"}, "'allow_remote'"),
        ({"parallel": 0}, "'parallel'"),
    ],
)
def test_arguments_that_are_refused(options: dict[str, Any], key: str) -> None:
    with pytest.raises(RewardError, match=key):
        ServerReward(**{"server": "http://127.0.0.1:1", "prompt": PROMPT} | options)


def test_addresses_of_this_machine() -> None:
    for url in ("http://127.0.0.1:8080/v1/", "http://localhost", "http://[::1]:9", "http://127.1.2.3"):
        ServerReward(server=url, prompt=PROMPT)
    assert ServerReward(server="http://127.0.0.1:1/v1/", prompt=PROMPT)._path == "/v1/chat/completions"
    assert server._is_loopback("::ffff:127.0.0.1") and not server._is_loopback("::ffff:10.0.0.1")
