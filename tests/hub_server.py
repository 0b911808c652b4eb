"""A hub on this machine: what pulling needs of the Hugging Face hub's protocol, and every way to fail in it."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """Nothing is said of a client that went away: commands share standard error with the test."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


@dataclass
class FakeHub:
    """``files``: of each repository. The rest is how it misbehaves."""

    files: dict[str, dict[str, bytes]]
    endpoint: str = ""
    break_after: int | None = None  # bytes of an answer, after which the connection is cut
    breaks: int = 0  # so many times
    hold: threading.Event | None = None  # waited for before it is cut
    ranges: bool = True
    wrong_range: bool = False
    surplus: bytes = b""  # sent after a file
    digests: dict[str, str] = field(default_factory=dict)  # lies, by the file's name
    in_git: frozenset[str] = frozenset()  # files without LFS
    without_digest: bool = False
    gated: frozenset[str] = frozenset()
    tags: frozenset[str] = frozenset()  # other names of the one commit
    token: str = ""  # that opens gated repositories
    statuses: list[int] = field(default_factory=list)  # of the next answers
    listing: bytes | None = None  # instead of the list of files
    cdn: str = ""  # another host, to which downloads are redirected
    asked: list[tuple[str, str | None, str | None]] = field(default_factory=list)  # path, range, authorization

    def info(self, repository: str) -> bytes:
        siblings = []
        for name, data in self.files[repository].items():
            entry: dict[str, object] = {"rfilename": name, "size": len(data)}
            if not self.without_digest:
                entry["blobId"] = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
                if name not in self.in_git:
                    digest = self.digests.get(name, hashlib.sha256(data).hexdigest())
                    entry["lfs"] = {"sha256": digest, "size": len(data), "pointerSize": 134}
            siblings.append(entry)
        return json.dumps({"id": repository, "sha": COMMIT, "siblings": siblings}).encode()


@contextmanager
def serving(hub: FakeHub) -> Iterator[FakeHub]:
    """The hub, listening on a free port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            path = unquote(self.path.partition("?")[0]).strip("/")
            hub.asked.append((path, self.headers["Range"], self.headers["Authorization"]))
            if hub.statuses:
                return self.refuse(hub.statuses.pop(0), "")
            api, cdn = path.startswith("api/models/"), path.startswith("cdn/")
            parts = path.removeprefix("api/models/").removeprefix("cdn/").split("/", 4 if not api else 3)
            repository = "/".join(parts[:2])
            if repository not in hub.files:
                return self.refuse(401 if self.headers["Authorization"] is None else 404, "RepoNotFound")
            if repository in hub.gated and not cdn and self.headers["Authorization"] != f"Bearer {hub.token}":
                return self.refuse(403 if self.headers["Authorization"] else 401, "GatedRepo")
            if parts[3] not in {"main", COMMIT, *hub.tags}:
                return self.refuse(404, "RevisionNotFound")
            if api:
                return self.answer(200, hub.info(repository) if hub.listing is None else hub.listing, {})
            if hub.cdn and not cdn:
                return self.answer(302, b"", {"Location": f"{hub.cdn}/cdn/{path}"})
            self.send(hub.files[repository][parts[4]] + hub.surplus)

        def refuse(self, status: int, code: str) -> None:
            self.answer(status, b"no", {"X-Error-Code": code} if code else {})

        def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def send(self, data: bytes) -> None:
            begin = 0
            asked = self.headers["Range"]
            if asked is not None and hub.ranges:
                begin = int(asked.removeprefix("bytes=").rstrip("-"))
                self.send_response(206)
                said = 0 if hub.wrong_range else begin
                self.send_header("Content-Range", f"bytes {said}-{len(data) - 1}/{len(data) - len(hub.surplus)}")
            else:
                self.send_response(200)
            body = data[begin:]
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if hub.breaks and hub.break_after is not None:
                hub.breaks -= 1
                self.wfile.write(body[: hub.break_after])
                if hub.hold is not None:
                    hub.hold.wait(60)
                self.close_connection = True
                return
            self.wfile.write(body)

    server = Server(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
