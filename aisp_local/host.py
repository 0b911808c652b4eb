"""What this process may use of the machine."""

from __future__ import annotations

import os

_MANY = 2**31


def processors() -> set[int]:
    """Numbers of the processors that this process may use, hyper-threads counted each."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


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
        with open("/sys/fs/cgroup/cpu.max", encoding="ascii") as file:
            quota, period = file.read().split()
        return _MANY if quota == "max" else max(1, int(quota) // int(period))
    except (OSError, ValueError):
        return _MANY


def available_memory() -> int | None:
    """Bytes of memory that can be had without swapping; None where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
