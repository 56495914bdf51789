"""The shards of one MDS folder as compact tables: what ``index.json`` says, without a Python object per shard.

An index of 1e9 samples lists 60,000 shards in 33 MB; as dictionaries they take 150 MB. It is parsed in blocks instead,
and
checked on the way: every entry must name a file inside its folder and have the same columns. The tables of a large
    index
are kept in the user's cache folder, so that a restart does not parse it again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import orjson
import xxhash
from numpy.typing import NDArray

from mixer.errors import DataError, InputError
from mixer.mapping import map_file

__all__ = ["ShardIndex", "read_index"]

# From fast to slow; of the hashes that an index offers, the first is checked.
_PREFERRED = (
    "xxh3_64",
    "xxh3_128",
    "xxh64",
    "xxh128",
    "xxh32",
    "blake2b",
    "sha1",
    "sha256",
    "md5",
    "blake2s",
    "sha512",
)
_BLOCK_BYTES = 1 << 20
_WORTH_KEEPING = 1 << 20  # bytes of an index from which on its tables are kept
_NEXT_ENTRY = b'}, {"column_encodings": '


@dataclass(frozen=True)
class ShardIndex:
    """Tables over S shards.

    Attributes:
        columns: name → encoding, the same in every shard.
        samples, raw_bytes, zip_bytes: (S,) int64; ``zip_bytes`` is 0 where a shard is stored raw.
        compression: as in the index (``zstd:3``), or None.
        algorithm: of the hashes below, or None where the index has none.
        raw_hashes, zip_hashes: (S,) hex digests as bytes; empty where missing.
        names: raw basenames, or None where they are ``shard.00000.mds`` and so on.
        fingerprint: ``sha256:`` of the file.
    """

    columns: Mapping[str, str]
    samples: NDArray[np.int64]
    raw_bytes: NDArray[np.int64]
    zip_bytes: NDArray[np.int64]
    compression: str | None
    algorithm: str | None
    raw_hashes: NDArray[np.bytes_]
    zip_hashes: NDArray[np.bytes_]
    names: Sequence[str] | None
    fingerprint: str

    def raw_name(self, shard: int) -> str:
        return self.names[shard] if self.names is not None else f"shard.{shard:05}.mds"

    def zip_name(self, shard: int) -> str | None:
        """Return the compressed file's name, or None for a shard that is stored raw."""
        if self.compression is None or not self.zip_bytes[shard]:
            return None
        return f"{self.raw_name(shard)}.{self.compression.partition(':')[0]}"


def read_index(folder: str | os.PathLike[str], domain: str) -> ShardIndex:
    """Read and check ``folder/index.json``.

    Raises:
        InputError: if there is none.
        DataError: if it is damaged, empty, points outside its folder, or its shards differ in columns.
    """
    path = Path(folder) / "index.json"
    try:
        before = path.stat()
        known = _recall(path, before)
        if known is not None:
            return known
        data = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"domain {domain!r}: cannot read {path}: {error.strerror}. Give a folder of MDS shards, or convert the"
            " domain again."
        ) from error
    try:
        tables = _tables(data)
        _remember(path, before, tables)
        return tables
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"domain {domain!r}: {path} is not a usable MDS index: {error}. Restore it, or convert the domain again."
        ) from error


def _tables(data: bytes) -> ShardIndex:
    samples, raw_bytes, zip_bytes, names, raw_hashes, zip_hashes = [], [], [], [], [], []
    shape: tuple[Any, ...] | None = None
    algorithm: str | None = None
    for entry in _entries(data):
        raw, zipped = entry["raw_data"], entry.get("zip_data")
        found = (
            entry["version"],
            entry["format"],
            entry["column_names"],
            entry["column_encodings"],
            entry["compression"],
        )
        if shape is None:
            shape = found
            algorithm = next((name for name in _PREFERRED if name in raw["hashes"]), None)
            algorithm = algorithm or next(iter(raw["hashes"]), None)
        if found != shape or found[:2] != (2, "mds"):
            raise ValueError(f"shard {raw['basename']!r} is {found}, the first one {shape}; expected version 2, 'mds'")
        names.append(_inside(raw["basename"]))
        samples.append(entry["samples"])
        raw_bytes.append(raw["bytes"])
        zip_bytes.append(zipped["bytes"] if zipped else 0)
        raw_hashes.append(raw["hashes"].get(algorithm, "").encode())
        zip_hashes.append(zipped["hashes"].get(algorithm, "").encode() if zipped else b"")
        if zipped and _inside(zipped["basename"]) != f"{raw['basename']}.{str(found[4]).partition(':')[0]}":
            raise ValueError(f"compressed file {zipped['basename']!r} does not belong to {raw['basename']!r}")
    if shape is None:
        raise ValueError("it lists no shards")
    counts = np.array(samples, np.int64)
    if (counts < 0).any():
        raise ValueError("it has shards with fewer than 0 samples")
    regular = all(name == f"shard.{i:05}.mds" for i, name in enumerate(names))
    return ShardIndex(
        columns=dict(zip(shape[2], shape[3], strict=True)),
        samples=counts,
        raw_bytes=np.array(raw_bytes, np.int64),
        zip_bytes=np.array(zip_bytes, np.int64),
        compression=shape[4],
        algorithm=algorithm,
        raw_hashes=np.array(raw_hashes, np.bytes_),
        zip_hashes=np.array(zip_hashes, np.bytes_),
        names=None if regular else names,
        fingerprint="sha256:" + hashlib.sha256(data).hexdigest(),
    )


# --- tables of large indexes, kept from one start to the next -------------------------------------------------------


def cache_folder() -> Path:
    """Return where this package keeps what it can make again."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "domain-mixer"


def _kept(path: Path, stat: os.stat_result) -> Path | None:
    """Return where the tables of this very file would be kept; None for a small one."""
    if stat.st_size < _WORTH_KEEPING:
        return None
    identity = f"2 {path.resolve()} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino}"
    return cache_folder() / "index" / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.tables"


def _recall(path: Path, stat: os.stat_result) -> ShardIndex | None:
    kept = _kept(path, stat)
    try:
        if kept is None or not kept.is_file():
            return None
        with open(kept, "rb") as file:
            content = map_file(file.fileno(), os.fstat(file.fileno()).st_size)
        head, at = orjson.loads(content[:_HEAD_BYTES].tobytes().rstrip()), _HEAD_BYTES
        facts = content[at : (at := at + head["facts"])]
        arrays: dict[str, Any] = {}
        for name, kind, count in head["arrays"]:
            arrays[name] = np.frombuffer(content, kind, count, at)
            at += -(-arrays[name].nbytes // 8) * 8
        if head["xxh3"] != xxhash.xxh3_64_hexdigest(content[_HEAD_BYTES:]):
            return None
        return ShardIndex(**arrays, **orjson.loads(facts))
    except (OSError, ValueError, KeyError, TypeError):
        return None  # it is only a copy


def _remember(path: Path, stat: os.stat_result, tables: ShardIndex) -> None:
    """Write the tables as they lie in memory: one line of JSON that describes them, facts as JSON, the arrays."""
    kept = _kept(path, stat)
    if kept is None:
        return
    facts = orjson.dumps({name: getattr(tables, name) for name in _FACTS})
    parts, arrays = [facts + b" " * (-len(facts) % 8)], []
    for name in _ARRAYS:
        array: NDArray[Any] = getattr(tables, name)
        arrays.append((name, array.dtype.str, len(array)))
        parts.append(array.tobytes() + bytes(-array.nbytes % 8))
    body = b"".join(parts)
    head = orjson.dumps({"xxh3": xxhash.xxh3_64_hexdigest(body), "facts": len(parts[0]), "arrays": arrays})
    partial = kept.with_name(f".{kept.name}.{os.getpid()}.tmp")
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(head.ljust(_HEAD_BYTES) + body)
        os.replace(partial, kept)
    except OSError:
        partial.unlink(missing_ok=True)  # no room or no right to keep it: the next start parses again


_HEAD_BYTES = 512
_ARRAYS = ("samples", "raw_bytes", "zip_bytes", "raw_hashes", "zip_hashes")
_FACTS = ("columns", "compression", "algorithm", "names", "fingerprint")


def _inside(name: str) -> str:
    if "/" not in name and "\\" not in name and "\0" not in name and name not in ("", ".", ".."):
        return name  # as nearly all are; what follows takes ten times as long
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise ValueError(f"file name {name!r} points outside its folder")
    return name


def _entries(data: bytes) -> Iterator[dict[str, Any]]:
    """Yield the entries block by block where the file looks as MDSWriter writes it, else from one parse."""
    head, tail = b'{"shards": [{"column_encodings": ', b'], "version": 2}'
    if len(data) < 2 * _BLOCK_BYTES or not (data.startswith(head) and data.endswith(tail)):
        yield from orjson.loads(data)["shards"]
        return
    start, stop = len(b'{"shards": ['), len(data) - len(tail)
    while start < stop:
        cut = data.find(_NEXT_ENTRY, min(start + _BLOCK_BYTES, stop), stop)
        end = cut + 1 if cut >= 0 else stop
        yield from orjson.loads(b"[" + data[start:end] + b"]")
        start = end + 2
