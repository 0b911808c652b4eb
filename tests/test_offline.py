"""The installed command without a network, in an empty home: it needs nothing else and leaves nothing behind.

An audit hook sees what Python does anywhere; the files left in HOME, in the working and in the temporary folder show
what native code wrote there too.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(sys.platform == "win32", reason="the report passes through an inherited descriptor"),
]

STORY = "Tell me a story."

# Reports every change of the file system, every socket and every child process, one JSON line each.
AUDIT = """
import json, os, sys

REPORT = int(os.environ.pop("AUDIT_FD"))
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = ("mkdir", "rename", "remove", "rmdir", "link", "symlink", "truncate", "chmod", "chown", "utime", "setxattr")
CHILDREN = ("system", "exec", "spawn", "posix_spawn", "fork", "forkpty")
WATCHED = {"os." + name for name in CHANGES + CHILDREN} | {"subprocess.Popen", "sqlite3.connect"}

def hook(event, arguments):
    if event == "open":
        path, _, flags = arguments
        if isinstance(path, int) or not flags & WRITES:
            return
        arguments = [path]
    elif event not in WATCHED and not event.startswith("socket."):
        return
    texts = [os.fsdecode(a) for a in arguments if isinstance(a, (str, bytes, os.PathLike))]
    os.write(REPORT, json.dumps([event, *texts]).encode() + b"\\n")

sys.addaudithook(hook)
"""
COMMAND = "from aisp_local.cli.main import main\nmain()"


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Path]:
    """Empty folders: home, work and tmp."""
    made = {name: tmp_path / name for name in ("home", "work", "tmp")}
    for path in made.values():
        path.mkdir()
    return made


def audited(
    code: str, arguments: Sequence[str], places: dict[str, Path], *, stdin: str = "", prefix: Sequence[str] = ()
) -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
    """Run Python code with nothing but these places; what it did to the world, devnull excepted."""
    keep = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "AISP_THREADS", "OPENBLAS_NUM_THREADS")
    environment = {name: os.environ[name] for name in keep if name in os.environ}
    environment |= {"HOME": str(places["home"]), "TMPDIR": str(places["tmp"])}
    environment |= {f"XDG_{n}_HOME": str(places["home"] / n.lower()) for n in ("CACHE", "CONFIG", "DATA", "STATE")}
    # pip compiles to bytecode when it installs; a checkout on the path would be compiled here.
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    with tempfile.TemporaryFile() as report:
        done = subprocess.run(
            [*prefix, sys.executable, "-P", "-c", AUDIT + code, *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=300,
            cwd=places["work"],
            env=environment | {"AUDIT_FD": str(report.fileno())},
            pass_fds=(report.fileno(),),
            check=False,
        )
        report.seek(0)
        events = [json.loads(line) for line in report]
    return done, [event for event in events if event != ["open", os.devnull]]


def files(places: dict[str, Path]) -> set[str]:
    """What is left in the places, folders included, but for the NVIDIA driver's own cache."""
    found = {
        path.relative_to(root.parent).as_posix() for root in places.values() for path in root.rglob("*") if root != path
    }
    return {name for name in found if not name.startswith("home/.nv")}


def without_network() -> list[str]:
    """A command that runs another one with no network interface; skips where that is not permitted."""
    command = ["unshare", "--map-root-user", "--net"]
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare here")
    tried = subprocess.run([*command, sys.executable, "-c", ""], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"a network namespace is not permitted here: {tried.stderr.strip()}")
    return command


@pytest.mark.parametrize("network", [True, False])
def test_generate_writes_nothing_and_connects_nowhere(network: bool, places: dict[str, Path]) -> None:
    arguments = ["generate", STORY, "--budget", "4", "--max-tokens", "16", "--json"]
    done, events = audited(COMMAND, arguments, places, prefix=[] if network else without_network())
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["candidates"]) == 4
    assert events == []
    assert files(places) == set()


@pytest.mark.parametrize("network", [True, False])
def test_a_conversation_writes_what_it_is_told_to(network: bool, places: dict[str, Path]) -> None:
    lines = [STORY, "/why", "/base", "And then?", "/save talk.txt", "/quit"]
    done, events = audited(
        COMMAND,
        ["chat", "--max-tokens", "8", "--rows", "8"],
        places,
        stdin="\n".join(lines),
        prefix=[] if network else without_network(),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("32 rollouts") == 2 and "[unaligned: reward" in done.stdout
    assert events, "the conversation was saved"
    for event, *paths in events:
        assert event in ("open", "os.rename")
        assert all(Path(path).parent == places["work"] for path in paths), (event, paths)
    assert files(places) == {"work/talk.txt"}
    assert (places["work"] / "talk.txt").read_text().startswith(f"You: {STORY}")


def test_the_audit_sees_files_sockets_and_children(places: dict[str, Path]) -> None:
    code = """
import socket, subprocess
os.mkdir("folder")
open("folder/a", "w").close()
os.replace("folder/a", "folder/b")
os.close(os.open("folder/b", os.O_RDWR))
open("folder/b").close()
try:
    socket.create_connection(("127.0.0.1", 1), timeout=1)
except OSError:
    pass
subprocess.run(["true"])
"""
    done, events = audited(code, [], places)
    assert done.returncode == 0, done.stderr
    assert ["os.mkdir", "folder"] in events
    assert events.count(["open", "folder/b"]) == 1 and ["open", "folder/a"] in events
    assert ["os.rename", "folder/a", "folder/b"] in events
    assert {"socket.connect", "subprocess.Popen"} <= {event for event, *_ in events}
    assert files(places) == {"work/folder", "work/folder/b"}


def test_there_is_no_network_where_there_is_said_to_be_none(places: dict[str, Path]) -> None:
    code = "import socket\nsocket.create_connection(('127.0.0.1', 9), timeout=5)"
    done, events = audited(code, [], places, prefix=without_network())
    assert "Network is unreachable" in done.stderr
    assert "socket.connect" in [event for event, *_ in events]
