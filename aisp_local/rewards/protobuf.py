"""The wire format of protobuf, as much of it as a walk through an ONNX file needs."""

from __future__ import annotations

import mmap
from collections.abc import Iterator


def varint(data: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    """A number and where the next thing begins. Raises ValueError if it is malformed."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            break
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number runs past the end")


def fields(data: mmap.mmap, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Length-delimited fields of a message: (number, start, end). Raises ValueError if it is malformed."""
    for number, wire, start, stop in every_field(data, at, end):
        if wire == 2:
            yield number, start, stop


def every_field(data: mmap.mmap, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """All fields of a message: (number, wire type, start, end) of what each holds."""
    while at < end:
        tag, at = varint(data, at, end)
        number, wire = tag >> 3, tag & 7
        start = at
        if wire == 0:
            _, at = varint(data, at, end)
        elif wire == 1:
            at += 8
        elif wire == 5:
            at += 4
        elif wire == 2:
            size, start = varint(data, at, end)
            if size > end - start:
                raise ValueError("a field runs past the end")
            at = start + size
        else:
            raise ValueError(f"wire type {wire} is unknown")
        if at > end:
            raise ValueError("a field runs past the end")
        yield number, wire, start, at


def integers(data: mmap.mmap, number: int, at: int, end: int) -> Iterator[int]:
    """The values of a repeated integer field of a message, packed or not, as unsigned numbers."""
    for field, wire, start, stop in every_field(data, at, end):
        if field != number or wire not in (0, 2):
            continue
        while start < stop:
            value, start = varint(data, start, stop)
            yield value
