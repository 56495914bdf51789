"""An MDS shard, compressed or not, read from front to back: its header, then sample after sample, in bounded memory."""

from __future__ import annotations

import functools
import io
from collections.abc import Iterator
from typing import IO

import numpy as np
import orjson
from numpy.typing import NDArray

from converters.files import damaged, open_bytes, skip
from mixer.errors import DataError, InputError
from mixer.mds import Header, encoded_size

__all__ = ["ShardFile"]

_TABLE_BYTES = 1 << 20  # of offsets at a time; a larger table is read beside the samples
_CONFIG_BYTES = 1 << 20


class ShardFile:
    """One shard, opened. ``columns`` are name -> encoding, in the order of their values in a sample.

    Raises: DataError: naming the file, if its header is none, or its bytes are not those that the header describes.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._data = open_bytes(path)
        self._table: IO[bytes] | None = None
        try:
            self._read_header()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> ShardFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._data.close()
        if self._table is not None:
            self._table.close()

    def _read_header(self) -> None:
        self.num_samples = int.from_bytes(self._exactly(4), "little")
        size = 4 * (self.num_samples + 1)
        if size <= _TABLE_BYTES:
            self._table = io.BytesIO(self._exactly(size))
        else:
            if skip(self._data, size) < size:
                raise EOFError(f"it claims {self.num_samples:,} samples and ends before the last offset")
            self._table = open_bytes(self.path)
            self._table.read(4)
        self._first = int(self._offsets(1)[0])
        length = self._first - 4 - size
        if not 0 < length <= _CONFIG_BYTES:
            raise damaged(self.path, f"its columns would take {length:,} bytes")
        try:
            facts = orjson.loads(self._exactly(length))
            self.columns = dict(zip(facts["column_names"], facts["column_encodings"], strict=True))
        except (ValueError, KeyError, TypeError) as error:
            raise damaged(self.path, f"its header does not describe its columns: {error!r}") from error

    def _exactly(self, size: int) -> bytes:
        data = self._data.read(size)
        if len(data) < size:
            raise EOFError(f"{size:,} bytes expected, {len(data):,} found")
        return data

    def _offsets(self, count: int) -> NDArray[np.int64]:
        assert self._table is not None
        data = self._table.read(4 * count)
        if len(data) < 4 * count:
            raise EOFError("it ends inside its table of offsets")
        return np.frombuffer(data, "<u4").astype(np.int64)

    def _blocks(self) -> Iterator[NDArray[np.int64]]:
        """Yield the offsets of consecutive samples, each with the end of the last; then check that the file ends."""
        last, left = self._first, self.num_samples
        while left:
            count = min(left, _TABLE_BYTES // 4)
            offsets = np.concatenate(([last], self._offsets(count)))
            if (np.diff(offsets) < 0).any():
                raise damaged(self.path, "its sample offsets do not grow")
            last, left = int(offsets[-1]), left - count
            yield offsets
        if self._data.read(1):
            raise damaged(self.path, f"it goes on after its last sample, which ends at byte {last:,}")

    def samples(self) -> Iterator[tuple[int, int, IO[bytes]]]:
        """Yield offset and size of every sample, and the file, from which the caller takes all of it."""
        for offsets in self._blocks():
            for start, size in zip(offsets[:-1].tolist(), np.diff(offsets).tolist()):
                yield start, size, self._data

    def value_lengths(self, file: IO[bytes], size: int) -> list[int]:
        """Return the bytes of each value of a sample of so many bytes, which ``file`` is at the beginning of."""
        heads = file.read(4 * self._sizes.count(None))
        varying = (int.from_bytes(heads[at : at + 4], "little") for at in range(0, len(heads), 4))
        lengths = [next(varying, 0) if length is None else length for length in self._sizes]
        if len(heads) + sum(lengths) != size:
            raise damaged(self.path, "the column sizes of its samples do not add up to their lengths")
        return lengths

    @functools.cached_property
    def _sizes(self) -> list[int | None]:
        try:
            return [encoded_size(encoding) for encoding in self.columns.values()]
        except (TypeError, AttributeError, InputError) as error:
            raise damaged(self.path, f"its header does not describe its columns: {error!r}") from error

    def groups(self, size_bytes: int, most_bytes: int) -> Iterator[tuple[NDArray[np.uint8], Header]]:
        """Yield consecutive samples of about ``size_bytes``: their bytes, and a header with offsets into those.

        Raises: DataError: if one sample has more than ``most_bytes``.
        """
        for offsets in self._blocks():
            at = 0
            while at < len(offsets) - 1:
                end = max(int(offsets.searchsorted(offsets[at] + size_bytes, "right")) - 1, at + 1)
                part = offsets[at : end + 1] - offsets[at]
                if part[-1] > max(size_bytes, most_bytes):
                    raise DataError(
                        f"{self.path} has a sample of {part[-1]:,} bytes, which is read whole, and {most_bytes:,} are"
                        " allowed: twice --max-record. Raise that, or leave the file out with --exclude."
                    )
                yield np.frombuffer(self._exactly(int(part[-1])), np.uint8), Header(end - at, part, {})
                at = end
