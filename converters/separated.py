"""Records of comma- or tab-separated values, one at a time, in bounded memory and in spite of broken quotes.

A quoted field may hold line breaks, so only the quotes tell where a record ends. One that is too long to keep is read
past, by its quotes, to where the next begins. Where a quote is never closed, or something else than a delimiter follows
the closing one, only the record's first line is given up, and reading goes on at the second: one stray quote does not
take the rest of the file with it.
"""

from __future__ import annotations

import csv
import io
import itertools
import re
import sys
from collections.abc import Iterator
from typing import NamedTuple

from converters.files import open_bytes, skip

__all__ = ["Record", "records"]

_ERRORS = "surrogateescape"  # bytes that are not UTF-8 do not end the file
_SKIP_CHARACTERS = 1 << 20


class Record(NamedTuple):
    """One record: its values, or (reason, detail) of what is wrong with it; its first line (from 1), offset and bytes.

    Of a record that is too long, ``raw`` is only the beginning.
    """

    values: list[str]
    problem: tuple[str, str] | None
    line: int
    offset: int
    raw: bytes


class _TooLong(Exception):
    """The record at hand does not fit."""


def records(path: str, delimiter: str, limit: int) -> Iterator[Record]:
    """Yield the records of a file, the header among them and blank lines not; a record of more than ``limit`` bytes has
    the problem ``oversized``."""
    csv.field_size_limit(sys.maxsize)
    with _Lines(path, limit) as lines:
        rows = csv.reader(lines, delimiter=delimiter, strict=True)
        while True:
            values: list[str] | None = []
            problem = None
            try:
                values = next(rows, None)
            except csv.Error as error:
                problem = ("csv", f"not a valid row: {error}")
                lines.give_back()
            except _TooLong:
                yield lines.pass_over(delimiter)
                continue
            if values is None:
                return
            number, offset, raw = lines.take()
            if len(raw) > limit:
                problem = ("oversized", "")
            if values or problem:
                yield Record(values, problem, number, offset, raw)
            del values, raw  # before the next one is read


class _Lines:
    """The lines of a file as ``csv.reader`` wants them; holds those of the record at hand, and can go back to them."""

    def __init__(self, path: str, limit: int) -> None:
        self._path, self._limit = path, limit
        self._open(0, 0)

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *error: object) -> None:
        self._text.close()

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._again.pop() if self._again else self._text.readline(self._limit + 1)
        if not line:
            raise StopIteration
        self._taken.append(line)
        self._size += len(line)
        if self._size > self._limit:
            raise _TooLong
        return line[1:] if not self._offset and len(self._taken) == 1 and line[0] == "\ufeff" else line

    def _open(self, offset: int, line: int) -> None:
        """Open the file at a line, by the numbers of bytes and lines before it."""
        file = open_bytes(self._path)
        skip(file, offset)
        self._text = io.TextIOWrapper(file, "utf-8", _ERRORS, newline="")
        self._offset, self._line = offset, line
        self._taken: list[str] = []
        self._size = 0  # characters in them
        self._again: list[str] = []  # given back; the next one last

    def give_back(self) -> None:
        """Give back all but the first line of the record."""
        self._again += reversed(self._taken[1:])
        del self._taken[1:]

    def take(self) -> tuple[int, int, bytes]:
        """Leave the record; return its first line, offset and bytes."""
        number, offset, raw = self._line + 1, self._offset, "".join(self._taken).encode("utf-8", _ERRORS)
        self._line += len(self._taken)
        self._offset += len(raw)
        self._taken, self._size = [], 0
        return number, offset, raw

    def pass_over(self, delimiter: str) -> Record:
        """Read to the end of a record that is too long; without an end, go back to its second line."""
        number, offset, raw = self._line + 1, self._offset, self._taken[0][:4096].encode("utf-8", _ERRORS)
        place = _Place(delimiter)
        size = first = lines = 0
        more = iter(lambda: self._again.pop() if self._again else self._text.readline(_SKIP_CHARACTERS), "")
        for part in itertools.chain(self._taken, more):
            size += len(part.encode("utf-8", _ERRORS))
            if part[-1] in "\r\n":
                lines += 1
                first = first or size
            if not place.read(part):
                break
        if place.is_whole:
            self._taken, self._size = [], 0
            self._line, self._offset = number - 1 + lines, offset + size
            return Record([], ("oversized", ""), number, offset, raw)
        self._text.close()
        self._open(offset + (first or size), number)
        what = f"a quote is not closed, or not by a delimiter, in the {lines:,} lines from here on"
        return Record([], ("csv", f"{what}; only this line is left out"), number, offset, raw)


class _Place:
    """Where in a record one is: at the start of a field, in a plain or quoted one, behind a quote, or at the end."""

    def __init__(self, delimiter: str) -> None:
        self._delimiter = delimiter
        self._outside = re.compile(f'[\r\n]|{delimiter}"')
        self._where = "start"

    @property
    def is_whole(self) -> bool:
        """Whether the record may end here."""
        return self._where not in ("quoted", "broken")

    def read(self, part: str) -> bool:
        """Go on by some characters; return False at the end of the record, or where it is broken."""
        at = 0
        while at < len(part) and self._where not in ("end", "broken"):
            at = self._step(part, at)
        return self._where not in ("end", "broken")

    def _step(self, part: str, at: int) -> int:
        if self._where == "quoted":
            quotes = _QUOTES.search(part, at)
            if quotes is None:
                return len(part)
            self._where = "quote" if (quotes.end() - quotes.start()) % 2 else "quoted"
            return quotes.end()
        if self._where == "quote" and part[at] not in ('"', self._delimiter, "\r", "\n"):
            self._where = "broken"
        elif self._where in ("quote", "start") and part[at] == '"':
            self._where = "quoted"
        else:
            found = self._outside.search(part, at)
            if found is None:
                self._where = "start" if part[-1] == self._delimiter else "plain"
                return len(part)
            self._where = "end" if found[0] in "\r\n" else "quoted"
            return found.end()
        return at + 1


_QUOTES = re.compile('"+')
