"""Thrift's compact protocol, as much of it as Parquet takes for its footer and the headers of its pages.

fields, end = read_struct(data, 0)      # {1: 7, 4: [{...}, {...}]}: values by the number of the field
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

__all__ = ["Read", "read_struct"]

_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)
_DEPTH = 16


class Read(NamedTuple):
    """A value, and where it ends."""

    value: Any
    end: int


def read_struct(data: bytes, at: int, items: Mapping[int, Callable[[Any], None]] | None = None, depth: int = 0) -> Read:
    """Read a struct that begins at ``at``.

    Args:
        items: by the number of a list of this struct: called with each of its values, which are not kept then.
    Raises: IndexError: if it goes on behind the data; ValueError: if it is none.
    """
    if depth > _DEPTH:
        raise ValueError("nested too deeply")
    found: dict[int, Any] = {}
    number = 0
    while head := data[at]:
        at += 1
        if head >> 4:
            number += head >> 4
        else:
            number, at = _zigzag(data, at)
        kind = head & 15
        if kind in (_TRUE, _FALSE):
            found[number] = kind == _TRUE
        elif items and number in items and kind == _LIST:
            at = _read_list(data, at, depth, items[number])
        else:
            found[number], at = _read_value(data, at, kind, depth)
    return Read(found, at + 1)


def _read_value(data: bytes, at: int, kind: int, depth: int) -> Read:
    if kind in (_TRUE, _FALSE, _BYTE):
        return Read(data[at], at + 1)
    if kind in (_I16, _I32, _I64):
        return _zigzag(data, at)
    if kind == _BINARY:
        length, at = _varint(data, at)
        return Read(_exactly(data, at, length), at + length)
    if kind in (_LIST, _SET):
        found: list[Any] = []
        return Read(found, _read_list(data, at, depth, found.append))
    if kind == _STRUCT:
        return read_struct(data, at, None, depth + 1)
    if kind == _DOUBLE:
        return Read(struct.unpack("<d", _exactly(data, at, 8))[0], at + 8)
    raise ValueError(f"no type of Parquet's: {kind}")


def _read_list(data: bytes, at: int, depth: int, take: Callable[[Any], None]) -> int:
    count, kind = data[at] >> 4, data[at] & 15
    at += 1
    if count == 15:
        count, at = _varint(data, at)
    for _ in range(count):
        value, at = _read_value(data, at, kind, depth)
        take(value)
    return at


def _exactly(data: bytes, at: int, length: int) -> bytes:
    if at + length > len(data):
        raise IndexError(f"{length} bytes at {at}, of {len(data)}")
    return data[at : at + length]


def _varint(data: bytes, at: int) -> Read:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return Read(value, at)
        if shift > 63:
            raise ValueError("no integer")


def _zigzag(data: bytes, at: int) -> Read:
    value, at = _varint(data, at)
    return Read((value >> 1) ^ -(value & 1), at)
