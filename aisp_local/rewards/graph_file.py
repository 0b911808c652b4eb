"""Tensors that an ONNX file stores, read from its protobuf without loading them.

ONNX Runtime allocates what a tensor declares; older versions do so before they look at what is there. What is declared
is compared first. Only field numbers of onnx.proto are used.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from aisp_local.errors import RewardError
from aisp_local.rewards.external_data import messages
from aisp_local.rewards.protobuf import every_field, fields, integers, varint

_GRAPH, _NODE, _INITIALIZER = 7, 1, 5
_DATA_FIELDS = (4, 5, 6, 7, 9, 10, 11)  # of a tensor: floats, 32-bit integers, strings, 64-bit, raw, doubles, unsigned
# ONNX's numbers of element types, as people call them.
_PRECISIONS = {
    1: "float32",
    2: "uint8",
    3: "int8",
    6: "int32",
    7: "int64",
    9: "bool",
    10: "float16",
    11: "float64",
    16: "bfloat16",
    17: "float8",
    18: "float8",
    19: "float8",
    20: "float8",
    21: "uint4",
    22: "int4",
    23: "float4",
}
_SAME_IDS = ("Cast", "Identity", "Reshape", "Unsqueeze", "Flatten")  # operators that hand ids on
_PER_BYTE = 4  # elements in a byte of the narrowest type, of two bits
_MOST_DIMENSIONS = 16  # of a tensor; networks need half of them


@dataclass(frozen=True)
class Tensor:
    """An initialiser of the main graph."""

    name: str
    shape: tuple[int, ...]
    precision: str
    stored: int  # bytes in the file itself; 0 for external data

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class GraphFile:
    """The initialisers of a model's main graph and what reads its inputs."""

    tensors: Mapping[str, Tensor]
    nodes: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...]  # operator, inputs, outputs

    @property
    def parameters(self) -> dict[str, int]:
        """Numbers that the model learned, by precision, most first: float tensors, and integers of two dimensions."""
        counts: dict[str, int] = {}
        for tensor in self.tensors.values():
            if "float" in tensor.precision or (len(tensor.shape) > 1 and tensor.precision not in ("int64", "bool")):
                counts[tensor.precision] = counts.get(tensor.precision, 0) + tensor.size
        return dict(sorted(counts.items(), key=lambda item: -item[1]))

    def rows_of(self, ids: str) -> int | None:
        """Rows of the table that the input ``ids`` selects from, the smallest if several; None if it is not found."""
        names = {ids}
        tables = []
        for operator, inputs, outputs in self.nodes:
            if operator in _SAME_IDS and inputs[:1] and inputs[0] in names:
                names.update(outputs)
            if operator in ("Gather", "GatherBlockQuantized") and len(inputs) > 1 and inputs[1] in names:
                table = self._source(inputs[0])
                if table is not None and len(table.shape) == 2:
                    tables.append(table.shape[0])
        return min(tables, default=None)

    def _source(self, name: str) -> Tensor | None:
        """The initialiser that a value is made of, through casts and dequantisation."""
        for _ in range(8):
            if name in self.tensors:
                return self.tensors[name]
            makers = [inputs for operator, inputs, outputs in self.nodes if name in outputs and inputs]
            if not makers:
                return None
            name = makers[0][0]
        return None


def read_graph(path: Path) -> GraphFile:
    """The stored tensors of an ONNX file. Raises RewardError if it is malformed, or declares more than it holds."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            tensors: dict[str, Tensor] = {}
            nodes = []
            for kind, at, end in messages(data, ("tensor", "sparse")):
                if kind == "sparse":  # a few bytes of it become a dense tensor of any size
                    raise RewardError(f"{path} stores a sparse tensor, which is not read; export the model densely")
                _tensor(path, data, at, end)  # constants of nodes and of inner graphs too
            for number, start, stop in fields(data, 0, len(data)):
                if number != _GRAPH:
                    continue
                for inner, at, end in fields(data, start, stop):
                    if inner == _INITIALIZER:
                        tensor = _tensor(path, data, at, end)
                        tensors[tensor.name] = tensor
                    elif inner == _NODE:
                        nodes.append(_node(data, at, end))
            return GraphFile(tensors, tuple(nodes))
    except (ValueError, IndexError) as error:
        if isinstance(error, RewardError):
            raise
        raise RewardError(f"{path} is not a complete ONNX file ({error}); restore it") from error
    except OSError as error:
        raise RewardError(f"{path} cannot be read ({error.strerror}); restore it") from error


def _text(data: mmap.mmap, start: int, stop: int) -> str:
    return bytes(data[start:stop]).decode("utf-8", "replace")


def _node(data: mmap.mmap, at: int, end: int) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    parts: dict[int, list[str]] = {1: [], 2: [], 4: []}
    for number, start, stop in fields(data, at, end):
        if number in parts:
            parts[number].append(_text(data, start, stop))
    return "".join(parts[4]), tuple(parts[1]), tuple(parts[2])


def _tensor(path: Path, data: mmap.mmap, at: int, end: int) -> Tensor:
    name, kind, stored, external = "", 0, 0, False
    for number, wire, start, stop in every_field(data, at, end):
        if number == 8 and wire == 2:
            name = _text(data, start, stop)
        elif number == 2 and wire == 0:
            kind = varint(data, start, stop)[0]
        elif number == 14 and wire == 0:
            external = varint(data, start, stop)[0] == 1
        elif number in _DATA_FIELDS:
            stored += stop - start
    shape = tuple(islice(integers(data, 1, at, end), _MOST_DIMENSIONS + 1))
    if len(shape) > _MOST_DIMENSIONS:
        raise RewardError(
            f"{path} declares a tensor {name[:80]!r} of more than {_MOST_DIMENSIONS} dimensions; restore the file, or "
            "export the model again"
        )
    tensor = Tensor(name, shape, _PRECISIONS.get(kind, f"type {kind}"), 0 if external else stored)
    room = stored
    if external:
        room = _external_size(path, data, at, end)
    if any(size >= 1 << 63 for size in shape) or tensor.size > room * _PER_BYTE:
        raise RewardError(
            f"{path} declares a tensor {name[:80]!r} of {' x '.join(map(str, shape))} elements and holds {room} bytes "
            "of it; restore the file, or export the model again"
        )
    return tensor


def _external_size(path: Path, data: mmap.mmap, at: int, end: int) -> int:
    """Bytes of the file that holds a tensor outside, the smallest if several are named; 0 where there is none."""
    sizes = []
    for entry in _entries(data, at, end):
        if entry.get(1) == "location":
            try:
                sizes.append((path.parent / entry.get(2, "")).stat().st_size)
            except (OSError, ValueError):
                return 0
    return min(sizes, default=0)


def _entries(data: mmap.mmap, at: int, end: int) -> Iterator[dict[int, str]]:
    for number, start, stop in fields(data, at, end):
        if number == 13:
            yield {inner: _text(data, a, b) for inner, a, b in fields(data, start, stop)}
