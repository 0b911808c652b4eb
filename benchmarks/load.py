"""Many clients of `aisp-local serve` at once, some of them bad: nothing lost, nothing crossed, bounded memory.

    python benchmarks/load.py [--clients 50] [--minutes 2] [--threads 1] [--parallel K]

Starts the command on the shipped models. Each good client asks again and again for short answers to a prompt of its own
(8 rollouts, 24 tokens), half of them streamed, and waits as long as it is told when it is refused. Beside them clients
that vanish in the middle, send a byte a second, send 10 MB, or send what is no UTF-8. At the end the server is killed
and started again, and every answer is looked at: was it drawn with its own client's prompt and random numbers? Beside
others logits are rounded otherwise, which may turn a draw that lies at a boundary: such an answer is the client's own,
and counted as "rounded" where the client was answered otherwise before. All others are crossed. Printed: answers,
refusals, latency, processor time, fairness, resident memory; last line: one JSON object.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aisp_local import shipped
from aisp_local.defaults import DEFAULT_TOGETHER
from aisp_local.engine import LlamaEngine
from aisp_local.engine.sampling import log_law
from aisp_local.seeds import RowSeeds
from aisp_local.types import Controls, FloatArray, Sampling, Step

ROWS, TOKENS = 8, 24
SAMPLING = Sampling(temperature=0.7)
NEAR = 0.05  # of the law's mass, by which rounding may move the boundary between two tokens
THINGS = ("cat", "dog", "fox", "bird", "fish", "boat", "tree", "ball", "hat", "cake", "star", "moon", "shoe", "book")


class Server:
    def __init__(self, threads: int, parallel: int, waiting: int) -> None:
        command = [sys.executable, "-m", "aisp_local", "serve", "--port", "0", "--threads", str(threads)]
        command += ["--parallel", str(parallel), "--waiting", str(waiting)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        line = self.process.stderr.readline()
        found = re.search(r"127\.0\.0\.1:(\d+)", line)
        if found is None:
            sys.exit(f"the server did not start: {line}")
        self.port = int(found[1])
        threading.Thread(target=self.process.stderr.read, daemon=True).start()

    def memory(self) -> float:
        """Resident MiB."""
        text = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        return int(re.search(r"VmRSS:\s+(\d+)", text)[1]) / 1024  # type: ignore[index]

    def seconds(self) -> float:
        """Of a processor, so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def request(self, body: bytes, timeout: float = 300.0) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request("POST", "/v1/chat/completions", body)
            answer = connection.getresponse()
            return answer.status, dict(answer.headers), answer.read()
        finally:
            connection.close()


class Alone:
    """What the model says with nobody beside it, to tell answers of a prompt and seed from all others."""

    def __init__(self) -> None:
        self.engine = LlamaEngine(shipped.model(), threads=1)

    def gave(self, prompt: str, seed: int, text: str) -> bool:
        """Whether best-of-n with this prompt and seed may give the text: every token of it is the one that a row's
        random number draws, or one whose share of the law begins or ends within ``NEAR`` of that number."""
        return any(self._drew(prompt, seed, row, text) for row in range(ROWS))

    def _drew(self, prompt: str, seed: int, row: int, text: str, given: Sequence[int] = ()) -> bool:
        """Whether the row may have drawn the text; it begins with the tokens that are ``given``."""
        tokens, logits = self._row(prompt, seed, row, given)
        pieces, wanted, step = [self.engine.piece(token) for token in tokens], text.encode(), len(given)
        while step < len(tokens) and pieces[step] and wanted.startswith(b"".join(pieces[: step + 1])):
            step += 1
        left = wanted[len(b"".join(pieces[:step])) :]
        if not left and (step == len(tokens) or not pieces[step]):
            return True
        if step == TOKENS:
            return False
        number = RowSeeds(seed).generator(row, "sampling").random(TOKENS)[step]
        for token in self._near(logits[step], number, left):
            if not left or step + 1 == TOKENS:
                if left == self.engine.piece(token):
                    return True
            elif self._drew(prompt, seed, row, text, [*tokens[:step], token]):
                return True
        return False

    def _row(self, prompt: str, seed: int, row: int, given: Sequence[int]) -> tuple[list[int], dict[int, FloatArray]]:
        """A row's tokens after those that are given, and its logits by step."""
        seen: dict[int, FloatArray] = {}

        class Look:
            needs_prelogits = False

            def __call__(self, step: Step) -> FloatArray:
                for i, tokens, logits in zip(step.rows, step.tokens, step.logits, strict=True):
                    if i == row:
                        seen[len(tokens)] = logits.copy()
                return step.logits

        prefixes = [np.array(given, np.int32)] * ROWS
        controls = Controls(ROWS, sampling=SAMPLING, processor=Look(), prefixes=prefixes if given else None)
        messages: Any = [{"role": "user", "content": prompt}]
        found = self.engine.rollout(messages, controls, max_tokens=TOKENS, seeds=RowSeeds(seed))
        return found.tokens[row].tolist(), seen

    def _near(self, logits: FloatArray, number: float, left: bytes) -> Iterator[int]:
        """Tokens that the text may go on with (none left: that end it) and that the number is near to."""
        ends = np.exp(log_law(logits[None], SAMPLING)[0]).cumsum()
        for token in np.flatnonzero((ends > number - NEAR) & (np.append(0.0, ends[:-1]) < number + NEAR)).tolist():
            piece = self.engine.piece(token)
            if (piece and left.startswith(piece)) if left else self.engine.model.eog[token]:
                yield token


class Tally:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.seconds: list[list[float]] = []
        self.texts: dict[int, dict[str, int]] = {}  # of each client, with how often
        self.refused = self.answered = 0
        self.problems: list[str] = []

    def compared(self, alone: Alone) -> tuple[int, int]:
        """How many answers are other than the client's first, and how many were not drawn for it."""
        rounded = crossed = 0
        for number, texts in self.texts.items():
            own = {text: times for text, times in texts.items() if alone.gave(prompt_of(number), number, text)}
            crossed += sum(texts.values()) - sum(own.values())
            rounded += sum(list(own.values())[1:])
        return rounded, crossed


def prompt_of(number: int) -> str:
    rng = random.Random(number)
    return "Tell me a story about " + " and ".join(f"a {rng.choice(THINGS)}" for _ in range(1 + number % 7)) + "."


def good(server: Server, number: int, end: float, tally: Tally) -> None:
    """Asks for as long as it may."""
    messages = [{"role": "user", "content": prompt_of(number)}]
    body: dict[str, Any] = {"messages": messages, "max_tokens": TOKENS, "seed": number}
    options = {"temperature": SAMPLING.temperature}
    body["aisp"] = {"budget": ROWS, "rows": ROWS, "settle": False, "method": "best-of-n", "options": options}
    if number % 2:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    while time.monotonic() < end:
        began = time.monotonic()
        try:
            status, headers, data = server.request(json.dumps(body).encode())
        except OSError as error:
            with tally.lock:
                tally.problems.append(f"client {number}: {error}")
            return
        if status == 429:
            with tally.lock:
                tally.refused += 1
            time.sleep(min(float(headers["retry-after"]), max(0.0, end - time.monotonic())))
            continue
        text = _text(data.decode()) if status == 200 else None
        with tally.lock:
            if text is None:
                tally.problems.append(f"client {number}: {status} {data[:200]!r}")
                continue
            mine = tally.texts.setdefault(number, {})
            mine[text] = mine.get(text, 0) + 1
            tally.answered += 1
            tally.seconds[number].append(time.monotonic() - began)


def _text(data: str) -> str | None:
    if not data.startswith("data: "):
        return str(json.loads(data)["choices"][0]["message"]["content"])
    events = [json.loads(line[6:]) for line in data.splitlines() if line.startswith("data: {")]
    if any("error" in event for event in events) or "data: [DONE]" not in data:
        return None
    return "".join(choice["delta"].get("content", "") for event in events for choice in event["choices"])


def bad(server: Server, kind: str, end: float, tally: Tally) -> None:
    """One of those that no server is spared."""
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
    while time.monotonic() < end:
        try:
            if kind == "10 MB":
                status, _, _ = server.request(b" " * 10_000_000)
                expected = 413
            elif kind == "no UTF-8":
                status, _, _ = server.request(b'{"messages": "\xff\xfe"}')
                expected = 400
            elif kind == "vanishes":
                with socket.create_connection(("127.0.0.1", server.port)) as one:
                    body = json.dumps({"messages": [{"role": "user", "content": "Tell me."}], "stream": True}).encode()
                    one.sendall(head + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
                    time.sleep(random.random())
                status = expected = 0
            else:
                with socket.create_connection(("127.0.0.1", server.port)) as one:
                    one.sendall(head + b"Content-Length: 1000\r\n\r\n")
                    one.settimeout(1.0)
                    status, expected = 0, 408
                    while time.monotonic() < end + 25 and not status:
                        try:
                            one.sendall(b" ")
                            found = one.recv(100)
                            status = int(found.split()[1]) if found else 408
                        except TimeoutError:
                            continue
            if status != expected:
                with tally.lock:
                    tally.problems.append(f"{kind}: {status}, expected {expected}")
        except OSError:  # refused before all was read
            pass
        time.sleep(0.5)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--parallel", type=int, default=DEFAULT_TOGETHER)
    parser.add_argument("--waiting", type=int, default=64)
    asked = parser.parse_args(arguments)
    server, tally = Server(asked.threads, asked.parallel, asked.waiting), Tally()
    tally.seconds = [[] for _ in range(asked.clients)]
    end = time.monotonic() + 60 * asked.minutes
    first, used = server.memory(), server.seconds()
    threads = [threading.Thread(target=good, args=(server, i, end, tally)) for i in range(asked.clients)]
    kinds = ("vanishes", "a byte a second", "10 MB", "no UTF-8")
    threads += [threading.Thread(target=bad, args=(server, kind, end, tally)) for kind in kinds]
    for thread in threads:
        thread.start()
    memory = []
    while time.monotonic() < end:
        time.sleep(1.0)
        memory.append(server.memory())
    for thread in threads:
        thread.join()
    used = server.seconds() - used
    server.process.kill()
    server.process.wait()
    again = Server(asked.threads, asked.parallel, asked.waiting)
    body = {"messages": [{"role": "user", "content": "Tell me."}], "max_tokens": 8, "aisp": {"budget": 4}}
    restarted = again.request(json.dumps(body).encode())[0]
    again.process.terminate()
    again.process.wait()
    rounded, crossed = tally.compared(Alone())
    each = [len(times) for times in tally.seconds]
    seconds = np.array([value for times in tally.seconds for value in times] or [float("nan")])
    figures = {
        "clients": asked.clients,
        "minutes": asked.minutes,
        "answered": tally.answered,
        "refused": tally.refused,
        "rounded": rounded,
        "crossed": crossed,
        "problems": len(tally.problems),
        "latency": [float(x) for x in np.quantile(seconds, [0.5, 0.95, 1.0])],
        "processor": used / max(1, tally.answered),
        "answers_a_client": [min(each), float(np.median(each)), max(each)],
        "memory": [first, max(memory, default=first), memory[-1] if memory else first],
        "after_a_kill": restarted,
    }
    print("| what | found |\n|---|---|")
    counts = f"{tally.answered}, {tally.refused}, {crossed}, {len(tally.problems)}"
    print(f"| answered, refused with 429, crossed, other problems | {counts} |")
    print(f"| answers that rounding made others | {rounded} |")
    print("| latency: median, 95%, longest, s | {:.1f}, {:.1f}, {:.1f} |".format(*figures["latency"]))
    print(f"| processor seconds of the server an answer | {figures['processor']:.3f} |")
    print("| answers a client: fewest, median, most | {}, {:.0f}, {} |".format(*figures["answers_a_client"]))
    print("| resident memory: at first, most, at the end, MiB | {:.0f}, {:.0f}, {:.0f} |".format(*figures["memory"]))
    print(f"| status of the first answer after a kill and a new start | {restarted} |")
    for problem in tally.problems[:10]:
        print(problem, file=sys.stderr)
    print(json.dumps(figures))
    sys.exit(bool(crossed or tally.problems or restarted != 200))


if __name__ == "__main__":
    main()
