"""The Hugging Face hub's protocol, as far as pulling GGUF files needs it.

Not by huggingface_hub: since its version 1 a download that was killed starts from nothing, none is compared with its
hash, and it has changed its HTTP library twice. Here bytes go to a .part file, which the next try continues, and what
is there at the end is what the hub's hash says, or is deleted.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.parse import quote

import requests

from aisp_local.errors import AispError, InputError
from aisp_local.files import hold
from aisp_local.models import store
from aisp_local.models.find import hugging_face_home
from aisp_local.models.names import is_model, n_parts, parts_of, plain, tag_of
from aisp_local.models.store import Pulled

ENDPOINT = "https://huggingface.co"
DEFAULT_TAG = "Q4_K_M"  # Ollama's and llama.cpp's
_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
_TRIES = 5  # in a row without a byte
_CHUNK = 1 << 16  # what is lost at most where a connection breaks
_TIMEOUT = (10.0, 60.0)  # seconds to connect, and between two pieces
_MAX_LISTING = 64 << 20
_NO_ADDRESS = (
    requests.exceptions.InvalidSchema,
    requests.exceptions.InvalidURL,
    requests.exceptions.MissingSchema,
)
_NONSENSE = (ValueError, KeyError, TypeError, AttributeError, RecursionError, requests.RequestException)

Progress = Callable[[str, int, int], None]
"""Called with a file's name, its bytes so far, and all of them."""


@dataclass(frozen=True)
class Remote:
    """A file of a repository. ``digest``: "sha256:..." or "git:..."; empty where the hub gives none."""

    name: str
    size: int
    digest: str


@dataclass(frozen=True)
class Listing:
    """What a repository holds at a commit."""

    repository: str
    commit: str
    files: Mapping[str, Remote]


class _BrokenOffError(Exception):
    """The connection failed on the way; worth another try."""


def parse(source: str) -> tuple[str, str]:
    """Repository and tag ("" without one) of ``[hf.co/]OWNER/NAME[:TAG]``. Raises InputError."""
    repository, _, tag = plain(source).strip("/").partition(":")
    if not _REPOSITORY.fullmatch(repository):
        raise InputError(f"{source} is not a repository; write OWNER/NAME or OWNER/NAME:QUANTISATION")
    return repository, tag


class Hub:
    """One hub, by HF_ENDPOINT, with the token in HF_TOKEN or the one that `hf auth login` keeps."""

    def __init__(self, endpoint: str | None = None, token: str | None = None) -> None:
        self.endpoint = (endpoint or os.environ.get("HF_ENDPOINT") or ENDPOINT).rstrip("/")
        self.token = token or _token()
        if not (self.token.isascii() and self.token.isprintable()):
            raise InputError("the token in HF_TOKEN holds characters that no token has; copy it again")
        self._session = requests.Session()
        self._session.headers["User-Agent"] = "aisp-local"
        self._session.headers["Accept-Encoding"] = "identity"  # bytes are counted
        self.pause = 1.0  # seconds before another try, twice as many before each next
        self.notice: Callable[[str], None] = lambda _: None  # told of each

    def list_files(self, repository: str, revision: str = "main") -> Listing:
        """Raises InputError for what does not exist or may not be read, AispError when the hub cannot be used."""
        url = f"{self.endpoint}/api/models/{repository}/revision/{quote(revision, safe='')}?blobs=true"
        with self._get(url, {}, repository, revision) as response:
            try:
                data = json.loads(_body(response))
                files = [_remote(entry) for entry in data["siblings"]]
                return Listing(repository, str(data["sha"]), {file.name: file for file in files})
            except _NONSENSE as error:
                raise AispError(f"{self.endpoint} answered with no list of files; is HF_ENDPOINT right?") from error

    def pull(self, listing: Listing, names: list[str], progress: Progress) -> Pulled:
        """Download files of a repository, the first of a model first, and record them.

        Raises AispError when the connection breaks off for good, or a file is not what the hub says; the next call
        goes on from what is here.
        """
        for name in names:
            if not listing.files[name].digest:
                raise AispError(f"the hub gives no hash of {name}, so that it could not be checked; nothing was pulled")
        paths = {name: store.file_path(listing.repository, name) for name in names}
        missing = sum(listing.files[n].size - _have(_part(paths[n], listing.files[n])) for n in names)
        _check_room(missing)
        for name, path in paths.items():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._fetch(listing, listing.files[name], path, progress)
            except OSError as error:
                raise InputError(
                    f"{error.filename or path} cannot be written ({error.strerror or error}); "
                    "make room, or set AISP_MODELS to another folder"
                ) from error
        pulled = Pulled(listing.repository, listing.commit, {name: listing.files[name].digest for name in names})
        store.save(pulled)
        return pulled

    def _fetch(self, listing: Listing, file: Remote, path: Path, progress: Progress) -> None:
        part = _part(path, file)
        if path.is_file() and path.stat().st_size == file.size:
            progress(file.name, file.size, file.size)
            if _digest(path, file) == file.digest:
                part.unlink(missing_ok=True)
                return
        url = f"{self.endpoint}/{listing.repository}/resolve/{listing.commit}/{quote(file.name)}"
        with part.open("ab") as out:
            hold(out, f"{path.name} is being pulled by another process; wait for it")
            failures = 0
            while (have := _have(part)) != file.size:
                if have > file.size:
                    out.truncate(0)
                    continue
                try:
                    self._append(url, listing, file, out, have, progress)
                except _BrokenOffError as error:
                    failures = 0 if _have(part) > have else failures + 1
                    if failures >= _TRIES:
                        raise AispError(
                            f"the download of {file.name} broke off after {_have(part)} of {file.size} bytes "
                            f"({error}); the same command goes on from there"
                        ) from error
                    self._wait(failures, error)
            os.fsync(out.fileno())
        found = _digest(part, file)
        if found != file.digest:
            part.unlink()
            raise AispError(
                f"{file.name} does not match the hub's hash (found {found[:19]}..., expected "
                f"{file.digest[:19]}...); it was deleted: pull it again, and if that fails do not trust this hub"
            )
        if is_model(file.name) and not _is_gguf(part):
            part.unlink()
            raise AispError(f"{file.name} is no GGUF file, whatever its name says; it was deleted: choose another")
        os.replace(part, path)

    def _append(self, url: str, listing: Listing, file: Remote, out: IO[bytes], have: int, progress: Progress) -> None:
        """Bytes from ``have`` on. Raises _BrokenOffError if they end too soon."""
        headers = {"Range": f"bytes={have}-"} if have else {}
        with self._get(url, headers, listing.repository, listing.commit) as response:
            if response.status_code == 206:
                _check_range(response.headers.get("Content-Range", ""), have, file)
            elif have:  # the whole file: ranges are not supported
                have = 0
                out.truncate(0)
            try:
                for chunk in response.iter_content(_CHUNK):
                    have += len(chunk)
                    if have > file.size:
                        out.truncate(0)
                        raise AispError(
                            f"the hub sends more than the {file.size} bytes that it lists of {file.name}; "
                            "they were deleted"
                        )
                    out.write(chunk)
                    progress(file.name, have, file.size)
            except requests.RequestException as error:
                raise _BrokenOffError(_reason(error)) from error
            finally:
                out.flush()
        if have < file.size:
            raise _BrokenOffError("the server ended it")

    @contextmanager
    def _get(self, url: str, headers: dict[str, str], repository: str, revision: str) -> Iterator[requests.Response]:
        """A response with a status of 200 or 206. requests keeps the token from other hosts, where redirects lead."""
        if self.token:
            headers = {**headers, "Authorization": f"Bearer {self.token}"}
        for failures in range(1, _TRIES + 1):
            try:
                response = self._session.get(url, headers=headers, stream=True, timeout=_TIMEOUT)
                if response.status_code in (408, 429) or response.status_code >= 500:
                    response.close()
                    raise _BrokenOffError(f"status {response.status_code}")
                break
            except _NO_ADDRESS as error:
                raise InputError(f"{self.endpoint} is no address; check HF_ENDPOINT") from error
            except (requests.RequestException, _BrokenOffError) as error:
                if failures == _TRIES:
                    reason = _reason(error)
                    raise AispError(
                        f"{self.endpoint} cannot be reached ({reason}); check the connection and try again: "
                        "a download goes on from where it was"
                    ) from error
                self._wait(failures, error)
        with response:
            if response.status_code == 416:  # what is there is not the beginning of it
                raise AispError(f"the hub has no such part of {url}; delete the .part files in {store.folder()}")
            if response.status_code not in (200, 206):
                raise self._refused(response, repository, revision)
            yield response

    def _wait(self, failures: int, error: Exception) -> None:
        seconds = self.pause * 2 ** max(0, failures - 1)
        self.notice(f"{self.endpoint}: {_reason(error)}; trying again in {seconds:.0f} s")
        time.sleep(seconds)

    def _refused(self, response: requests.Response, repository: str, revision: str) -> AispError:
        status, code = response.status_code, response.headers.get("X-Error-Code", "")
        page = f"{self.endpoint}/{repository}"
        if code == "GatedRepo" or (status == 403 and code != "RepoNotFound"):
            token = "the token may not read it" if self.token else "set HF_TOKEN to a token of yours"
            return InputError(f"{repository} is gated: accept its terms at {page}; {token}")
        if code == "RevisionNotFound":
            return InputError(f"{repository} has no revision {revision}; choose another with --revision")
        if status in (401, 404):
            token = "the token in HF_TOKEN may not read it" if self.token else "it is private and needs HF_TOKEN"
            return InputError(f"{repository} does not exist at {self.endpoint}, or {token}; check the name")
        return AispError(f"{self.endpoint} answered with status {status}; try again later")


def choose(listing: Listing, tag: str = "", pattern: str = "") -> list[str]:
    """The files of one model: by the quantisation or other end of its name, or by a pattern of its file's name.

    Without either the only one, else Q4_K_M. Raises InputError where none is meant, or several are.
    """
    firsts = sorted(name for name in listing.files if is_model(name))
    if not firsts:
        raise InputError(f"{listing.repository} holds no GGUF model; look for a repository of the same model with one")
    wanted = pattern or tag
    if any(c in wanted for c in "*?[") or wanted.lower().endswith(".gguf"):
        low = wanted.lower()
        found = [n for n in firsts if any(fnmatch.fnmatch(x.lower(), low) for x in (n, PurePosixPath(n).name))]
    elif wanted:
        found = [name for name in firsts if tag_of(name).lower() == wanted.lower()]
        found = found or [name for name in firsts if wanted.lower() in PurePosixPath(name).name.lower()]
    else:
        found = firsts if len(firsts) == 1 else [name for name in firsts if tag_of(name) == DEFAULT_TAG]
    if len(found) != 1:
        said = f"no model that matches {wanted!r}" if wanted else f"{len(firsts)} models and no {DEFAULT_TAG}"
        said = f"several models that match {wanted or DEFAULT_TAG!r}" if found else said
        known = ", ".join(sorted({tag_of(name) for name in firsts} if not found else set(found)))
        raise InputError(f"{listing.repository} has {said}; choose with OWNER/NAME:TAG or --file: {known}")
    names = parts_of(found[0], listing.files)
    if len(names) != n_parts(found[0]):
        raise InputError(f"{listing.repository} lacks parts of {found[0]}; choose another model")
    return names


def _token() -> str:
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if os.environ.get(variable, "").strip():
            return os.environ[variable].strip()
    with suppress(OSError, UnicodeDecodeError):
        return (
            Path(os.environ.get("HF_TOKEN_PATH") or hugging_face_home() / "token").read_text(encoding="ascii").strip()
        )
    return ""


def _body(response: requests.Response) -> bytes:
    """What was answered, which may not be of any size."""
    body = bytearray()
    for chunk in response.iter_content(_CHUNK):
        body += chunk
        if len(body) > _MAX_LISTING:
            raise ValueError("too long")
    return bytes(body)


def _remote(entry: Any) -> Remote:
    lfs = entry.get("lfs")
    if lfs:
        digest, size = f"sha256:{lfs['sha256']}".lower(), int(lfs["size"])
        if not re.fullmatch("sha256:[0-9a-f]{64}", digest):
            digest = ""
    else:
        digest, size = f"git:{entry.get('blobId') or ''}", int(entry.get("size") or 0)
        if not re.fullmatch("git:[0-9a-f]{40}", digest):
            digest = ""
    if size < 0:
        raise ValueError("a size below 0")
    return Remote(str(entry["rfilename"]), size, digest)


def _check_range(said: str, have: int, file: Remote) -> None:
    found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", said.strip())
    if found is None or int(found[1]) != have or found[3] not in ("*", str(file.size)):
        raise AispError(
            f"the hub was asked for {file.name} from byte {have} on and answered {said or 'no range'!r}; "
            "nothing was added to what is here"
        )


def _is_gguf(path: Path) -> bool:
    with path.open("rb") as content:
        return content.read(4) == b"GGUF"


def _digest(path: Path, file: Remote) -> str:
    kind = file.digest.partition(":")[0]
    with path.open("rb") as content:
        if kind == "sha256":
            return f"sha256:{hashlib.file_digest(content, 'sha256').hexdigest()}"
        begin = hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False)
        return f"git:{hashlib.file_digest(content, lambda: begin).hexdigest()}"


def _part(path: Path, file: Remote) -> Path:
    """Named by the hash too: what was begun of another version is not continued."""
    return path.with_name(f".{path.name}.{file.digest.rpartition(':')[2][:12]}{store.PART}")


def _have(part: Path) -> int:
    try:
        return part.stat().st_size
    except OSError:
        return 0


def _check_room(missing: int) -> None:
    place = store.folder()
    while not place.exists() and place != place.parent:
        place = place.parent
    free = shutil.disk_usage(place).free
    if missing > free:
        raise InputError(
            f"{missing / 1e9:.1f} GB are missing and {place} has room for {free / 1e9:.1f} GB; "
            "make room, or set AISP_MODELS to a folder on another disk"
        )


def _reason(error: Exception) -> str:
    """What lies at the bottom, on one line."""
    while isinstance(cause := error.__cause__ or error.__context__, Exception):
        error = cause
    return (str(error).splitlines() or [type(error).__name__])[0][:160]
