"""What the machine has, as a container sees it."""

from __future__ import annotations

from pathlib import Path

import pytest

from aisp_local import host


def container(folder: Path, limit: str, current: int, files: int = 0) -> Path:
    (folder / "memory.max").write_text(limit + "\n", encoding="ascii")
    (folder / "memory.current").write_text(f"{current}\n", encoding="ascii")
    stat = f"anon 5\nfile {files}\ninactive_file {files}\nactive_file 0\n"
    (folder / "memory.stat").write_text(stat, encoding="ascii")
    return folder


def test_memory_is_what_the_container_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_free_memory", lambda: 1000)
    monkeypatch.setattr(host, "_CGROUP", container(tmp_path, "600", 250, files=100))
    assert host.available_memory() == 450
    container(tmp_path, "600", 900)
    assert host.available_memory() == 0
    container(tmp_path, "5000", 250)
    assert host.available_memory() == 1000
    container(tmp_path, "max", 250)
    assert host.available_memory() == 1000
    (tmp_path / "memory.max").unlink()
    assert host.available_memory() == 1000
    monkeypatch.setattr(host, "_free_memory", lambda: None)
    assert host.available_memory() is None


def test_cores_are_those_that_the_container_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_CGROUP", tmp_path)
    monkeypatch.setattr(host, "processors", lambda: {100_000, 100_001, 100_002})
    assert host.available_cores() == 3
    for quota, cores in (("200000 100000", 2), ("50000 100000", 1), ("max 100000", 3), ("rubbish", 3)):
        (tmp_path / "cpu.max").write_text(quota, encoding="ascii")
        assert host.available_cores() == cores
