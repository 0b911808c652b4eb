"""What the machine can do at best, by simple loops, and what it is."""

from __future__ import annotations

import ctypes
import hashlib
import platform
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from aisp_local.host import processor, processors
from aisp_local.native import versions


def _best(function: Callable[[], object], repeats: int = 5) -> float:
    """Seconds of the fastest of some calls."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def memory_bandwidth(threads: int, megabytes: int = 512) -> float:
    """Bytes a second that ``threads`` threads move together, the best of a few loops without BLAS.

    The largest value and the bits of 512 MiB, which are read; a copy of half of them onto the other half, read and
    written.
    """
    data = np.ones(megabytes * 2**18, np.float32)
    parts = np.array_split(data, threads)
    halves = [np.array_split(half, threads) for half in np.array_split(data, 2)]
    copies = list(zip(*halves, strict=True))
    largest: list[Callable[[], object]] = [part.max for part in parts]
    bits: list[Callable[[], object]] = [partial(np.bitwise_or.reduce, part.view(np.uint64)) for part in parts]
    copy: list[Callable[[], object]] = [
        partial(ctypes.memmove, target.ctypes.data, source.ctypes.data, source.nbytes) for source, target in copies
    ]
    return data.nbytes / min(_best(partial(_together, loop)) for loop in (largest, bits, copy))


def _together(work: Sequence[Callable[[], object]]) -> None:
    """Each in a thread of its own."""
    workers = [threading.Thread(target=part) for part in work]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def describe() -> dict[str, str]:
    """Machine and versions."""
    return {
        "processor": processor(),
        "processors": str(len(processors())),
        "system": platform.system(),
        "python": platform.python_version(),
        **versions(),
    }


def sha256(path: Path) -> str:
    """The first 12 digits of a file's hash."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()[:12]


def resident() -> int:
    """Bytes of memory of this process that no file stands behind."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("the system does not say how much memory a process has")
