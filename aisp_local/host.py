"""What this process may use of the machine."""

from __future__ import annotations

import os
import platform
from pathlib import Path

_MANY = 2**31
_CGROUP = Path("/sys/fs/cgroup")


def processors() -> set[int]:
    """Numbers of the processors that this process may use, hyper-threads counted each."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def processor() -> str:
    """What the processor calls itself."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def available_cores() -> int:
    """Cores that this process may use, those of hyper-threads counted once where the system tells them apart."""
    cores = set()
    for cpu in processors():
        try:
            with open(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", encoding="ascii") as file:
                cores.add(file.read())
        except OSError:
            cores.add(str(cpu))
    return max(1, min(len(cores), _quota()))


def _quota() -> int:
    """Whole processors that a container's limit leaves, at least one; the many that a machine can have without one."""
    try:
        quota, period = (_CGROUP / "cpu.max").read_text(encoding="ascii").split()
        return _MANY if quota == "max" else max(1, int(quota) // int(period))
    except (OSError, ValueError):
        return _MANY


def available_memory() -> int | None:
    """Bytes of memory that can be had without swapping, within a container's limit; None where nothing says."""
    found = [bytes_ for bytes_ in (_free_memory(), _limited_memory(_CGROUP)) if bytes_ is not None]
    return min(found, default=None)


def _free_memory() -> int | None:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return None


def _limited_memory(folder: Path) -> int | None:
    """What a container's limit leaves; pages of files that were only read do not count, the kernel takes them back."""
    try:
        limit = (folder / "memory.max").read_text(encoding="ascii").strip()
        if limit == "max":
            return None
        used = int((folder / "memory.current").read_text(encoding="ascii"))
        lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
        kept = sum(int(line.split()[1]) for line in lines if line.startswith(("inactive_file ", "active_file ")))
        return max(0, int(limit) - max(0, used - kept))
    except (OSError, ValueError, IndexError):
        return None
