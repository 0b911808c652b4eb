"""The messages of an ONNX file at any depth, and where it keeps tensors outside itself, read without loading it.

ONNX Runtime would open those paths; they are checked first. Only field numbers of onnx.proto are used.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

from aisp_local.errors import RewardError
from aisp_local.rewards.protobuf import fields

# (message, field) -> message; what is not listed is skipped without being read.
_CHILDREN = {
    ("model", 7): "graph",
    ("model", 25): "function",
    ("graph", 1): "node",
    ("graph", 5): "tensor",
    ("graph", 15): "sparse",
    ("function", 7): "node",
    ("node", 5): "attribute",
    ("attribute", 5): "tensor",
    ("attribute", 6): "graph",
    ("attribute", 10): "tensor",
    ("attribute", 11): "graph",
    ("attribute", 22): "sparse",
    ("attribute", 23): "sparse",
    ("sparse", 1): "tensor",
    ("sparse", 2): "tensor",
    ("tensor", 13): "entry",
}
_MAX_DEPTH = 64


def external_locations(path: Path) -> list[str]:
    """The distinct external-data locations of an ONNX file. Raises RewardError if it is malformed."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return sorted(set(_locations(data)))
    except (ValueError, IndexError) as error:
        raise RewardError(f"{path} is not a complete ONNX file ({error}); restore it") from error
    except OSError as error:
        raise RewardError(f"{path} cannot be read ({error.strerror}); restore it") from error


def _locations(data: mmap.mmap) -> Iterator[str]:
    for _, at, end in messages(data, ("entry",)):
        parts = {number: bytes(data[start:stop]) for number, start, stop in fields(data, at, end)}
        if parts.get(1) == b"location":
            yield parts.get(2, b"").decode("utf-8", "replace")


def messages(data: mmap.mmap, kinds: tuple[str, ...]) -> Iterator[tuple[str, int, int]]:
    """Every message of these kinds (tensor, sparse, entry), in graphs within graphs too: (kind, start, end)."""
    return _messages(data, kinds, 0, len(data), "model", 0)


def _messages(
    data: mmap.mmap, kinds: tuple[str, ...], at: int, end: int, message: str, depth: int
) -> Iterator[tuple[str, int, int]]:
    if depth > _MAX_DEPTH:
        raise ValueError("graphs are nested too deeply")
    if message in kinds:
        yield message, at, end
    for number, start, stop in fields(data, at, end) if message != "entry" else ():
        child = _CHILDREN.get((message, number))
        if child is not None:
            yield from _messages(data, kinds, start, stop, child, depth + 1)
