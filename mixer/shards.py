"""The samples of one domain on disk: an MDS folder as an array of rows that is read where it lies.

    shards = open_domain("shards", "web", "train")
    shards.num_samples, shards.seq_len
    shards.read(np.array([5, 0, 123]))            # (3, T) in the stored dtype

Raw shards are memory-mapped; compressed ones are decompressed once, to the raw file beside them. Before the first
sample of a shard is used, its size, its offsets and (unless ``verify="never"``) its hash are checked; what does not
hold is an error that names domain, file and remedy. ``prepare`` does all this ahead of need, in threads.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mixer import mds
from mixer.checked import checked_in_this_run, identity
from mixer.errors import DataError, InputError
from mixer.folders import load_manifest
from mixer.index import ShardIndex, cache_folder, read_index
from mixer.manifest import Manifest
from mixer.mapping import map_file

if TYPE_CHECKING:
    from mixer.cache import RemoteCache

__all__ = ["DomainShards", "Verify", "View", "decompress", "open_domain"]

Verify = Literal["hash", "never"]
Indices = NDArray[np.int64]
_CHUNK = 1 << 22
_CLOCK_TICK = 20_000_000  # ns; file systems may take their times from a clock as coarse as 10 ms


class View(NamedTuple):
    """One shard, mapped and checked. Row i of the token column is ``data[start(i) : start(i) + row_bytes]``."""

    data: memoryview
    first: int
    stride: int
    starts: list[int] | NDArray[np.int64] | None  # where rows lie at no fixed distance
    lengths: NDArray[np.int64] | None = None  # tokens of each row, where they differ

    def start(self, row: int) -> int:
        return self.first + row * self.stride if self.starts is None else int(self.starts[row])

    def length(self, row: int, seq_len: int) -> int:
        return seq_len if self.lengths is None else int(self.lengths[row])


class DomainShards:
    """The samples of one split of one domain. Safe to use from several threads.

    Attributes:
        domain, split, folder: where they come from.
        num_samples, shard_sizes: samples, and (S,) samples per shard.
        columns: name → MDS encoding.
        column, dtype, seq_len: the token column, its stored dtype, its length T.
        variable: whether samples differ in length; ``seq_len`` is then the greatest that is known.
        fingerprint: ``sha256:`` of the index.
        cache: where shards come from, if they are remote.
    """

    cache: RemoteCache | None = None

    def __init__(
        self,
        domain: str,
        split: str,
        folder: Path,
        *,
        column: str | None = None,
        dtype: str | None = None,
        verify: Verify = "hash",
        variable: bool | None = False,
        seq_len: int = 0,
    ) -> None:
        if verify not in ("hash", "never"):
            raise InputError(f"verify must be 'hash' or 'never'; got {verify!r}.")
        self.domain, self.split, self.folder, self.verify = domain, split, folder, verify
        self.index: ShardIndex = read_index(folder, domain)
        self.columns = self.index.columns
        self.fingerprint = self.index.fingerprint
        self.shard_sizes = self.index.samples
        self.num_samples = int(self.shard_sizes.sum())
        self.firsts = np.concatenate([[0], np.cumsum(self.shard_sizes)])
        self._views: dict[int, View] = {}
        self._pending: dict[int, Future[Any]] = {}
        self.checked = checked_in_this_run() if verify == "hash" else None
        self._lock = threading.Lock()
        self.column = _token_column(self.columns, column, domain)
        self.mean_length: float | None = None  # of the first shard, where that was looked at
        self.variable = bool(variable)
        kind, length = mds.ndarray_spec(self.columns[self.column])
        if variable and (kind or self.columns[self.column] == "bytes"):
            self.dtype, self.seq_len, self._prefix = np.dtype(kind or dtype or "int64"), length or seq_len, b""
        else:
            self.dtype, self.seq_len, self._prefix = self._token_shape(dtype, variable)
        self.row_bytes = self.dtype.itemsize * self.seq_len

    def __len__(self) -> int:
        return self.num_samples

    def read(self, indices: Indices) -> NDArray[Any]:
        """Return the token rows (n, T) of samples (n,), in the stored dtype, as a new array."""
        rows = np.asarray(indices, np.int64)
        if rows.size and not 0 <= rows.min() <= rows.max() < self.num_samples:
            raise InputError(
                f"domain {self.domain!r} has samples 0…{self.num_samples - 1:,}; asked for {rows.min()}…{rows.max()}."
            )
        if self.variable:
            raise InputError(f"samples of domain {self.domain!r} differ in length: use read_lists instead of read.")
        out = np.empty((len(rows), self.seq_len), self.dtype)
        if not out.size:
            return out
        target, width = memoryview(out.data).cast("B"), self.row_bytes
        shards = np.searchsorted(self.firsts, rows, side="right") - 1
        for k, (shard, row) in enumerate(zip(shards.tolist(), (rows - self.firsts[shards]).tolist())):
            view = self.view(shard)
            start = view.start(row)
            target[k * width : (k + 1) * width] = view.data[start : start + width]
        return out

    def read_lists(self, indices: Indices) -> list[NDArray[Any]]:
        """Return the tokens of samples (n,) as n arrays, each of its own length, in the stored dtype."""
        shards = np.searchsorted(self.firsts, indices, side="right") - 1
        found = []
        for shard, row in zip(shards.tolist(), (np.asarray(indices, np.int64) - self.firsts[shards]).tolist()):
            view = self.view(shard)
            count = view.length(row, self.seq_len)
            found.append(np.frombuffer(view.data, self.dtype, count, view.start(row)).copy())
        return found

    def view(self, shard: int) -> View:
        """Return a shard ready to be read, waiting for its preparation if need be.

        Raises: DataError: if it is missing, truncated, damaged or not what the index says.
        """
        view = self._views.get(shard)
        if view is not None:
            return view
        pending = self._pending.get(shard)
        try:
            # What is still queued behind others is opened here and now; so is what failed some time ago, if that costs
            # little: it may have been mended.
            stale = pending is not None and pending.done() and pending.exception() and self.cache is None
            view = None if pending is None or pending.cancel() or stale else pending.result()
        finally:  # after an error the next attempt looks again
            self._pending.pop(shard, None)
        view = view or self._open(shard)
        with self._lock:
            return self._views.setdefault(shard, view)

    def prepare(self, shards: Iterable[int]) -> None:
        """Start to fetch, decompress and check shards in the background, in this order; errors appear on reading."""
        for shard in shards:
            with self._lock:
                if shard not in self._views and shard not in self._pending:
                    self._pending[shard] = _threads("ahead").submit(self._open_ahead, shard)

    def need(self, shards: Iterable[int]) -> None:
        """Start on shards that are about to be waited for, side by side, before everything that is only ahead."""
        for shard in shards:
            with self._lock:
                pending = self._pending.get(shard)
                if shard not in self._views and (pending is None or pending.cancel()):
                    self._pending[shard] = _threads("now").submit(self._open, shard)

    def keep(self, shards: Iterable[int]) -> None:
        """Let go of the memory maps of all other shards, and of what was to be prepared of them."""
        wanted = set(shards)
        with self._lock:
            for shard in [shard for shard in self._views if shard not in wanted]:
                del self._views[shard]
            for shard in [shard for shard in self._pending if shard not in wanted]:
                self._pending.pop(shard).cancel()

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without what belongs to this process; the worker maps for itself, and knows what has been checked."""
        return {**self.__dict__, "_views": {}, "_pending": {}, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    # --- one shard -------------------------------------------------------------------------------------------------

    def _open(self, shard: int) -> View:
        if not self.shard_sizes[shard]:
            return View(memoryview(b""), 0, 0, None)
        path = self._raw_file(shard)
        try:
            return self._checked_view(shard, path)
        except DataError:
            # A copy of something that can be had again: another program may have left it damaged, or removed it.
            if self.index.zip_name(shard) is None:
                raise
            return self._checked_view(shard, self._raw_file(shard, anew=True))

    def _open_ahead(self, shard: int) -> View | None:
        """Open a shard before it is needed, or leave it until then and return None."""
        return self._open(shard)

    def _checked_view(self, shard: int, path: Path) -> View:
        data = self._map_checked(path, int(self.index.raw_bytes[shard]), self.index.raw_hashes[shard])
        return self._layout(path, data, shard)

    def _raw_file(self, shard: int, *, anew: bool = False) -> Path:
        """Return the path of the raw shard, decompressing it if it is not there in full or is wanted ``anew``."""
        raw = self.folder / self.index.raw_name(shard)
        zip_name = self.index.zip_name(shard)
        kept = self.cache_folder() / self.index.raw_name(shard)
        for path in (raw, kept):
            if zip_name is None or (not anew and _size(path) == self.index.raw_bytes[shard]):
                return path
        zipped = self.folder / str(zip_name)
        self._check_file(zipped, int(self.index.zip_bytes[shard]), self.index.zip_hashes[shard])
        content = self._decompressed(zipped, int(self.index.raw_bytes[shard]))
        for target in (raw, kept):  # beside the compressed file, or in the cache where that folder is read-only
            try:
                return _write_atomically(target, content)
            except OSError as error:
                if target == kept or error.errno not in (errno.EACCES, errno.EROFS, errno.EPERM):
                    raise self._no_room(target, content, error) from error
        raise AssertionError("unreachable: the last target returns or raises")

    def _check_file(self, path: Path, size_bytes: int, digest: bytes) -> None:
        self._map_checked(path, size_bytes, digest)

    def _map_checked(self, path: Path, size_bytes: int, digest: bytes) -> memoryview:
        """Map a file and compare it with its hash, unless a process of this run has done that for this very file."""
        data, stat = self._map_file(path, size_bytes)
        if self.checked is not None and digest and self.index.algorithm is not None:
            # A file may be written to within a tick of the clock and show it by no time.
            settled = time.time_ns() - stat.st_ctime_ns > _CLOCK_TICK
            self.checked.once(
                self._as_checked(stat, digest), lambda: self._check_hash(path, data, digest), remember=settled
            )
        return data

    def _as_checked(self, stat: os.stat_result, digest: bytes) -> str:
        return f"{identity(stat)} {self.index.algorithm} {digest.decode()}"

    def _decompressed(self, zipped: Path, size_bytes: int) -> bytes:
        data = self._map(zipped, zipped.stat().st_size)
        try:
            content = decompress(str(self.index.compression), data, size_bytes)
        except InputError:
            raise
        except Exception as error:
            raise self._damaged(zipped, f"does not decompress as {self.index.compression}: {error}") from error
        if len(content) != size_bytes:
            raise self._damaged(zipped, f"decompresses to {len(content):,} bytes, its index says {size_bytes:,}")
        return content

    def _no_room(self, target: Path, content: bytes, error: OSError) -> DataError:
        return DataError(
            f"domain {self.domain!r}: cannot write the decompressed shard {target} ({len(content):,} bytes):"
            f" {error.strerror}. Free space there or set XDG_CACHE_HOME to a folder with room."
        )

    def cache_folder(self) -> Path:
        """Return where raw shards go when their own folder cannot be written."""
        return cache_folder() / self.fingerprint.rpartition(":")[2][:32]

    def _map(self, path: Path, size_bytes: int) -> memoryview:
        return self._map_file(path, size_bytes)[0]

    def _map_file(self, path: Path, size_bytes: int) -> tuple[memoryview, os.stat_result]:
        try:
            with open(path, "rb") as file:
                stat = os.fstat(file.fileno())
                if stat.st_size != size_bytes:
                    raise self._damaged(path, f"has {stat.st_size:,} bytes, its index says {size_bytes:,}")
                return map_file(file.fileno(), size_bytes), stat
        except FileNotFoundError:
            raise self._damaged(path, "is missing") from None
        except OSError as error:
            raise DataError(
                f"domain {self.domain!r}, shard {path}: cannot be read: {error.strerror}. See to its permissions and to"
                " the disk that it lies on, or restore it from where it came from."
            ) from error

    def _check_hash(self, path: Path, data: memoryview, digest: bytes) -> None:
        hasher = mds.hasher(str(self.index.algorithm))
        for start in range(0, len(data), _CHUNK):
            hasher.update(data[start : start + _CHUNK])
        if hasher.hexdigest() != digest.decode():
            raise self._damaged(
                path, f"has {self.index.algorithm} {hasher.hexdigest()}, its index says {digest.decode()}"
            )

    def _layout(self, path: Path, data: memoryview, shard: int) -> View:
        """Find where the token rows lie, and check that the offsets describe the file."""
        content = np.frombuffer(data, np.uint8)
        try:
            header = mds.parse_header(content, "it")
            starts, sizes = mds.column_spans(content, header, self.columns, self.column)
        except DataError as error:
            raise self._damaged(path, f"does not hold what an MDS shard holds: {error}") from error
        if header.num_samples != self.shard_sizes[shard]:
            raise self._damaged(
                path, f"holds {header.num_samples:,} samples, its index says {self.shard_sizes[shard]:,}"
            )
        if self.variable:
            return View(data, 0, 0, *self._lengths(path, content, (starts, sizes), self.dtype))
        prefix, alike = self._prefix, True
        if prefix:  # every value must announce the same shape
            announced = content[starts[:, None] + np.arange(len(prefix))]
            alike = bool((announced == np.frombuffer(prefix, np.uint8)).all())
        if not alike or (sizes != len(prefix) + self.row_bytes).any():
            raise self._damaged(
                path,
                f"has samples of column {self.column!r} that are not {self.seq_len} tokens of {self.dtype}; sizes run"
                f" from {sizes.min() - len(prefix):,} to {sizes.max() - len(prefix):,} bytes",
            )
        steps = np.diff(starts)
        if len(steps) == 0 or (steps == steps[0]).all():
            stride = int(steps[0]) if len(steps) else 0
            return View(data, int(starts[0]) + len(prefix), stride, None)
        return View(data, 0, 0, (starts + len(prefix)).tolist())

    def _lengths(self, path: Path, content: NDArray[np.uint8], spans: tuple[Indices, Indices], dtype: Any) -> Any:
        """Return where the tokens of every row begin, and how many there are, both (n,)."""
        try:
            return mds.row_lengths(content, self.columns[self.column], dtype, *spans)
        except DataError as error:
            raise self._damaged(path, f"has values of column {self.column!r} that are no tokens: {error}") from error

    def _damaged(self, path: Path, what: str) -> DataError:
        return DataError(
            f"domain {self.domain!r}, shard {path}: {what}. The file is damaged or not the one the index was written"
            " for: restore it from where it came from, or convert the domain again."
        )

    def _raw_content(self, shard: int) -> memoryview:
        return self._map(self._raw_file(shard), int(self.index.raw_bytes[shard]))

    def _token_shape(self, dtype: str | None, variable: bool | None) -> tuple[np.dtype[Any], int, bytes]:
        """Return dtype, T and what precedes every row, from the encoding or else from the first shard.

        Where nobody knows yet, its samples and the index also tell whether lengths differ.
        """
        encoding = self.columns[self.column]
        size = mds.encoded_size(encoding)
        if size is not None and encoding.startswith("ndarray"):
            _, kind, shape = mds.ndarray_prefix(encoding, b"")
            return np.dtype(kind), int(np.prod(shape or ())), b""
        shard = int(np.flatnonzero(self.shard_sizes)[0])
        path, content = self.folder / self.index.raw_name(shard), np.frombuffer(self._raw_content(shard), np.uint8)
        try:
            starts, sizes = mds.column_spans(content, mds.parse_header(content, "it"), self.columns, self.column)
        except DataError as error:
            raise self._damaged(path, f"does not hold what an MDS shard holds: {error}") from error
        value = bytes(content[starts[0] : starts[0] + sizes[0]])
        if variable is None:
            self.variable = self._differs(shard, sizes)
        if self.variable:
            of_first = mds.ndarray_prefix(encoding, value)[1] if encoding != "bytes" else dtype or "int64"
            _, lengths = self._lengths(path, content, (starts, sizes), of_first)
            self.mean_length = float(lengths.mean())
            return np.dtype(of_first), int(lengths.max()), b""
        if encoding == "bytes":  # llm-foundry writes int64 ids
            kind_of_bytes = np.dtype(dtype or "int64")
            return kind_of_bytes, len(value) // kind_of_bytes.itemsize, b""
        length, kind, shape = mds.ndarray_prefix(encoding, value)
        if kind is None or shape is None:
            raise self._damaged(path, f"has a first sample whose column {self.column!r} ({encoding}) cannot be decoded")
        return np.dtype(kind), int(np.prod(shape)), value[:length]

    def _differs(self, shard: int, sizes: NDArray[np.int64]) -> bool:
        """Say whether the first shard's samples differ in size, or the other shards are not multiples of them."""
        if (sizes != sizes[0]).any():
            return True
        if [mds.encoded_size(encoding) for encoding in self.columns.values()].count(None) > 1:
            return False  # another column's sizes are in the index too
        fixed = sum(mds.encoded_size(encoding) or 0 for encoding in self.columns.values())
        rest = self.index.raw_bytes - self.shard_sizes * (8 + fixed + sizes[0])
        return bool((rest != rest[shard]).any())


def open_domain(
    root: str | os.PathLike[str],
    domain: str,
    split: str = "train",
    *,
    verify: Verify = "hash",
    manifest: Manifest | None = None,
    cache: RemoteCache | None = None,
) -> DomainShards:
    """Open one split of one domain of a folder of shards.

    Args:
        root: a folder with a manifest, or of MDS folders by domain; with ``cache`` the cache's folder.
        verify: "hash" checks every shard's hash before its first use, "never" only sizes and offsets.
        manifest: of ``root``, if it was read already.
        cache: where shards come from if not from ``root``.
    Raises: InputError: for an unknown domain or split; DataError: for an index that is damaged or not the manifest's.
    """
    manifest = manifest or load_manifest(root, cache)
    entry, folder = manifest.split(domain, split), Path(root) / manifest.split(domain, split).path
    if ".." in Path(entry.path).parts or os.path.isabs(entry.path):
        raise DataError(f"domain {domain!r}: the manifest of {root} points outside it: {entry.path!r}. Restore it.")
    options: dict[str, Any] = {"column": manifest.column, "dtype": manifest.dtype, "verify": verify}
    options |= {"variable": manifest.variable_length, "seq_len": manifest.seq_len}
    if cache is not None and cache.holds(entry.path):
        from mixer.remote_folders import fetch_index
        from mixer.remote_shards import RemoteShards

        fetch_index(cache, entry)
        shards: DomainShards = RemoteShards(domain, split, entry.path, cache=cache, **options)
    else:
        shards = DomainShards(domain, split, folder, **options)
    if entry.fingerprint and shards.fingerprint != entry.fingerprint:
        raise DataError(
            f"domain {domain!r}: {folder / 'index.json'} has fingerprint {shards.fingerprint}, the manifest of"
            f" {root} says {entry.fingerprint}. If an extension or conversion was interrupted, run the same command"
            " again, which finishes it; otherwise one of the two was changed: restore it."
        )
    return shards


def decompress(compression: str, data: memoryview, size_bytes: int) -> bytes:
    """Return the content of a compressed shard. zstd here; other kinds by streaming's own code."""
    if compression.partition(":")[0] == "zstd":
        import zstandard

        return zstandard.ZstdDecompressor().decompress(data, max_output_size=size_bytes)
    from mixer.streaming_door import decompress as by_streaming

    return by_streaming(compression, bytes(data))


def _token_column(columns: Mapping[str, str], wanted: str | None, domain: str) -> str:
    """Return the column that holds the token ids: the one asked for, else by its usual names, else the only one."""
    for name in (wanted or "tokens", "tokens", "input_ids"):
        if name in columns and _holds_tokens(columns[name]):
            return name
    candidates = [name for name, encoding in columns.items() if _holds_tokens(encoding)]
    if len(candidates) == 1:
        return candidates[0]
    raise InputError(
        f"domain {domain!r} has no column of token ids: it has {dict(columns)}; expected {wanted or 'tokens'!r} as an"
        " ndarray of integers or raw bytes."
    )


def _holds_tokens(encoding: str) -> bool:
    kind, _, rest = encoding.partition(":")
    return kind == "bytes" or (kind == "ndarray" and "float" not in rest)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _write_atomically(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with open(partial, "wb") as file:
            file.write(content)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return path


_pools: dict[tuple[int, str], ThreadPoolExecutor] = {}
_SIZES = {"ahead": 4, "now": 16}


def _threads(purpose: str) -> ThreadPoolExecutor:
    """Return this process's threads for a purpose; a forked child starts its own."""
    key = (os.getpid(), purpose)
    if key not in _pools:
        _pools[key] = ThreadPoolExecutor(_SIZES[purpose], thread_name_prefix=f"mixer-{purpose}")
    return _pools[key]
