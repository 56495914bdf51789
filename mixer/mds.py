"""The MDS shard layout, in NumPy alone: the same bytes as mosaicml-streaming's ``MDSWriter``, without importing it.

    uint32 n | uint32 offset[n + 1] | JSON of the columns | sample 0 | sample 1 | ...

A sample is the uint32 sizes of its variable-length columns, then the values of all columns, in the order of their
names. Offsets count from the start of the file; nothing is aligned, so values are copied out before use.

    raw = encode_shard({"tokens": "ndarray:uint16:4"}, np.zeros((2, 4), np.uint16))
    entry = shard_entry({"tokens": "ndarray:uint16:4"}, "shard.00000.mds", raw, num_samples=2)
    write_index(folder, [entry])
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mixer.errors import DataError, InputError

__all__ = [
    "SIZE_LIMIT",
    "Header",
    "Ragged",
    "column_spans",
    "compress",
    "compression_extension",
    "decode_value",
    "empty_shard",
    "encode_shard",
    "encoded_size",
    "hash_hex",
    "hasher",
    "index_bytes",
    "ndarray_prefix",
    "ndarray_spec",
    "parse_header",
    "row_lengths",
    "sample_values",
    "shard_buffer",
    "shard_entry",
    "shard_of_rows",
    "shard_overhead",
    "token_encoding",
    "write_index",
]

SIZE_LIMIT = 1 << 26  # MDSWriter's default

_SCALARS = ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float16", "float32", "float64")
Raw = bytes | bytearray | memoryview

# The byte by which a dynamic ndarray names its dtype, and the two bits by which it names the dtype of its shape.
_DTYPE_CODES = {
    "uint8": 8, "int8": 9, "uint16": 16, "int16": 17, "float16": 18, "uint32": 32, "int32": 33, "float32": 34,
    "uint64": 64, "int64": 65, "float64": 66,
}  # fmt: skip
_SHAPE_DTYPES = ("uint8", "uint16", "uint32", "uint64")


def token_encoding(dtype: str, seq_len: int) -> str:
    """Return the encoding of a fixed-length token column.

    >>> token_encoding("uint16", 2048)
    'ndarray:uint16:2048'
    """
    return f"ndarray:{np.dtype(dtype).name}:{int(seq_len)}"


def encoded_size(encoding: str) -> int | None:
    """Return the bytes of every value in this encoding, or None where they vary.

    >>> encoded_size("ndarray:uint16:2048"), encoded_size("int"), encoded_size("str")
    (4096, 8, None)
    """
    kind, _, rest = encoding.partition(":")
    if kind == "ndarray":
        dtype, shape = _ndarray_spec(encoding)
        return None if dtype is None or shape is None else int(np.prod(shape)) * np.dtype(dtype).itemsize
    if rest or kind not in _ENCODERS:
        return None
    if kind == "int":
        return 8
    return np.dtype(kind).itemsize if kind in _SCALARS else None


def encode_shard(
    columns: Mapping[str, str],
    samples: NDArray[Any] | Mapping[str, Sequence[Any] | NDArray[Any]] | Sequence[Mapping[str, Any]],
    *,
    compression: str | None = None,
    hashes: Sequence[str] = (),
    size_limit: int | None = SIZE_LIMIT,
) -> bytes:
    """Return the raw bytes of one shard, identical to ``MDSWriter``'s.

    Args:
        columns: name → encoding.
        samples: an array (n, T) of the only column's dtype; or name → n values (``Ragged`` for vectors); or n mappings
            name → value.
        compression, hashes, size_limit: what the shard's header says of how it is stored. The bytes returned are not
            compressed; give the same values to ``shard_entry``.
    Raises: InputError: if a value does not fit its column, or the shard would pass 2**32 bytes (offsets are uint32).

    >>> len(encode_shard({"tokens": "ndarray:uint16:4"}, np.zeros((3, 4), np.uint16)))
    225
    """
    names = sorted(columns)
    if any(encoded_size(columns[name]) is None for name in names):
        how: dict[str, Any] = {"compression": compression, "hashes": hashes, "size_limit": size_limit}
        table = _as_table(names, samples)
        return bytes(shard_buffer(columns, len(table[names[0]]), [table], **how))
    num_samples, row_bytes, body = _encode_fixed(names, columns, _as_table(names, samples))
    head = _head(np.full(num_samples, row_bytes, np.int64), _config_bytes(columns, compression, hashes, size_limit))
    return b"".join((head, body))


def shard_buffer(
    columns: Mapping[str, str],
    num_samples: int,
    chunks: Iterable[NDArray[Any] | Mapping[str, Sequence[Any] | NDArray[Any]] | Sequence[Mapping[str, Any]]],
    *,
    compression: str | None = None,
    hashes: Sequence[str] = (),
    size_limit: int | None = SIZE_LIMIT,
) -> bytearray:
    """Return what ``encode_shard`` does of samples that come in chunks, so that only one of them is in memory.

    Raises: ValueError: if there are not ``num_samples`` in all chunks.
    """
    names = sorted(columns)
    config = _config_bytes(columns, compression, hashes, size_limit)
    shard = bytearray(4 + 4 * (num_samples + 1) + len(config))
    sizes = np.zeros(num_samples, np.uint32)
    is_fixed = all(encoded_size(columns[name]) for name in names)
    at = 0
    for table in (some for chunk in chunks for some in _some_at_a_time(_as_table(names, chunk), names[0])):
        stop = at + len(table[names[0]])
        if stop > num_samples:
            break
        if is_fixed:
            _, sizes[at:stop], body = _encode_fixed(names, columns, table)
            shard += body
        else:
            sizes[at:stop], parts = _encode_rows(names, columns, table)
            shard += b"".join(parts)
        at = stop
    if at != num_samples:
        raise ValueError(f"{num_samples:,} samples were announced, {at:,} came.")
    _write_head(shard, sizes, config)
    return shard


_SAMPLES_AT_ONCE = 1 << 10


def _some_at_a_time(table: Mapping[str, Any], first_name: str) -> Iterator[dict[str, Any]]:
    """Yield name → values of consecutive samples."""
    ends = {name: np.cumsum(each.lengths) for name, each in table.items() if isinstance(each, Ragged)}
    for start in range(0, len(table[first_name]), _SAMPLES_AT_ONCE):
        some: dict[str, Any] = {}
        for name, values in table.items():
            if name in ends:
                lengths = values.lengths[start : start + _SAMPLES_AT_ONCE]
                last = int(ends[name][start + len(lengths) - 1])
                some[name] = Ragged(values.values[last - int(lengths.sum()) : last], lengths)
            else:
                some[name] = values[start : start + _SAMPLES_AT_ONCE]
        yield some


def empty_shard(
    columns: Mapping[str, str],
    num_samples: int,
    *,
    compression: str | None = None,
    hashes: Sequence[str] = (),
    size_limit: int | None = SIZE_LIMIT,
) -> tuple[memoryview, NDArray[Any]]:
    """Return a shard of one fixed-length ndarray column, to be filled: its raw bytes, and a view (n, T) of the samples.

    For shards of half the memory: see ``encode_shard``, which gives the same bytes from an array.
    """
    (encoding,) = columns.values()
    dtype, shape = _ndarray_spec(encoding)
    size = encoded_size(encoding)
    if dtype is None or shape is None or size is None:
        raise InputError(f"a column of fixed length was expected, got {encoding!r}.")
    head = _head(np.full(num_samples, size, np.int64), _config_bytes(columns, compression, hashes, size_limit))
    raw = np.empty(len(head) + num_samples * size, np.uint8)  # in large pages and not zeroed, unlike a bytearray
    raw[: len(head)] = np.frombuffer(head, np.uint8)
    rows = np.frombuffer(raw, dtype, num_samples * int(np.prod(shape)), len(head))
    return raw.data, rows.reshape(num_samples, *shape)


def shard_of_rows(columns: Mapping[str, str], rows: Sequence[bytes], *, hashes: Sequence[str] = ()) -> bytes:
    """Return the raw bytes of a shard of samples that are encoded already: each as it stands in another such shard.

    >>> columns = {"tokens": "ndarray:uint16:4"}
    >>> whole = encode_shard(columns, np.zeros((2, 4), np.uint16))
    >>> shard_of_rows(columns, [whole[-16:-8], whole[-8:]]) == whole
    True
    """
    sizes = np.fromiter(map(len, rows), np.int64, len(rows))
    return b"".join((_head(sizes, _config_bytes(columns, None, hashes, SIZE_LIMIT)), *rows))


def _head(sizes: NDArray[np.int64], config: bytes) -> bytes:
    """Return what stands before the samples of these sizes."""
    head = bytearray(4 + 4 * (len(sizes) + 1) + len(config))
    _write_head(head, sizes, config)
    return bytes(head)


def _write_head(shard: bytearray, sizes: NDArray[Any], config: bytes) -> None:
    """Fill in what stands before the samples of these sizes: their number, where each begins and the last ends, how
    they are stored."""
    count = len(sizes)
    begin = 8 + 4 * count + len(config)
    size = begin + int(sizes.sum(dtype=np.int64))
    if size >= 1 << 32:
        raise InputError(
            f"a shard of {size:,} bytes does not fit: MDS offsets are uint32. Give fewer samples per shard (here"
            f" {count:,})."
        )
    numbers = np.frombuffer(shard, "<u4", 2 + count)
    numbers[0], numbers[1] = count, begin
    np.cumsum(sizes, dtype=np.uint32, out=numbers[2:])
    numbers[2:] += np.uint32(begin)
    shard[begin - len(config) : begin] = config


def shard_overhead(
    columns: Mapping[str, str],
    *,
    compression: str | None = None,
    hashes: Sequence[str] = (),
    size_limit: int | None = SIZE_LIMIT,
) -> int:
    """Return the bytes a shard takes beyond its samples and 4 per sample, as ``MDSWriter`` counts to cut shards."""
    return 8 + len(_config_bytes(columns, compression, hashes, size_limit))


def shard_entry(
    columns: Mapping[str, str],
    basename: str,
    raw: Raw | Mapping[str, Any],
    *,
    num_samples: int,
    compression: str | None = None,
    zipped: bytes | Mapping[str, Any] | None = None,
    hashes: Sequence[str] = (),
    size_limit: int | None = SIZE_LIMIT,
) -> dict[str, Any]:
    """Return a shard's entry in ``index.json``, as ``MDSWriter`` writes it.

    Args:
        basename: of the raw file, ``shard.00000.mds``; the compressed one gets the extension.
        raw, zipped: the file's bytes, or ``{"bytes": size, "hashes": {...}}`` when they are known already.
        num_samples: samples in the shard.
    """
    if bool(compression) != (zipped is not None):
        raise InputError(
            f"shard {basename}: compression {compression!r} and {'no ' if zipped is None else ''}compressed bytes"
            " contradict each other."
        )
    config = _config(columns, compression, hashes, size_limit)
    zip_data = (
        _file_info(f"{basename}.{compression_extension(compression)}", zipped, hashes)
        if compression and zipped is not None
        else None
    )
    return {**config, "samples": int(num_samples), "raw_data": _file_info(basename, raw, hashes), "zip_data": zip_data}


def write_index(folder: str | os.PathLike[str], entries: Sequence[Mapping[str, Any]]) -> Path:
    """Write ``index.json`` atomically and return its path."""
    path = Path(folder) / "index.json"
    partial = path.with_name(f".index.json.{os.getpid()}.tmp")
    partial.write_bytes(index_bytes(entries))
    os.replace(partial, path)
    return path


def index_bytes(entries: Sequence[Mapping[str, Any]]) -> bytes:
    """Return the content of ``index.json``, byte for byte as ``MDSWriter`` writes it."""
    return json.dumps({"version": 2, "shards": list(entries)}, sort_keys=True).encode("utf-8")


class Header(NamedTuple):
    """The start of a shard: ``offsets`` (n + 1,) int64 in bytes from the start of the file, and the columns' JSON."""

    num_samples: int
    offsets: NDArray[np.int64]
    config: dict[str, Any]


def parse_header(shard: bytes | memoryview | NDArray[np.uint8], name: str = "shard") -> Header:
    """Read and check a raw shard's header.

    Raises: DataError: naming ``name``, if counts and offsets do not describe this many bytes.
    """
    data = np.frombuffer(shard, np.uint8) if not isinstance(shard, np.ndarray) else shard
    size = data.nbytes
    if size < 8:
        raise DataError(
            f"{name} has only {size} bytes; an MDS shard has at least 8. It is truncated: fetch or convert it again."
        )
    num_samples = int(data[:4].view("<u4")[0])
    table_end = 4 + 4 * (num_samples + 1)
    if table_end > size:
        raise DataError(
            f"{name} claims {num_samples:,} samples, but has only {size:,} bytes. It is truncated or damaged: fetch or"
            " convert it again."
        )
    offsets = data[4:table_end].copy().view("<u4").astype(np.int64)
    if offsets[0] < table_end or offsets[-1] != size or bool((np.diff(offsets) < 0).any()):
        raise DataError(
            f"{name}: its sample offsets {offsets[0]:,}…{offsets[-1]:,} do not describe its {size:,} bytes. It is"
            " truncated or damaged: fetch or convert it again."
        )
    try:
        config = json.loads(bytes(data[table_end : offsets[0]]))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(
            f"{name}: its header is not JSON ({error}). It is damaged: fetch or convert it again."
        ) from error
    return Header(num_samples, offsets, config)


def column_spans(
    shard: NDArray[np.uint8], header: Header, columns: Mapping[str, str], column: str
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where the encoded values of one column start, and their sizes, both (n,) int64 in bytes.

    Raises: DataError: if the sizes that a sample gives for its columns do not add up to its length.
    """
    sizes = [encoded_size(columns[name]) for name in sorted(columns)]
    begins, lengths = header.offsets[:-1], np.diff(header.offsets)
    varying = [i for i, size in enumerate(sizes) if size is None]
    if varying and len(lengths) and lengths.min() < 4 * len(varying):
        raise DataError(f"samples as short as {lengths.min()} bytes cannot hold the sizes of {len(varying)} columns")
    heads = begins[:, None] + np.arange(4 * len(varying))
    widths = shard[heads].view("<u4").astype(np.int64) if varying else np.zeros((len(begins), 0), np.int64)
    spans = np.empty((len(begins), len(sizes)), np.int64)
    for i, size in enumerate(sizes):
        spans[:, i] = widths[:, varying.index(i)] if size is None else size
    if not (spans.sum(axis=1) + 4 * len(varying) == lengths).all():
        raise DataError("the column sizes of its samples do not add up to their lengths")
    place = sorted(columns).index(column)
    return begins + 4 * len(varying) + spans[:, :place].sum(axis=1), spans[:, place]


def ndarray_prefix(encoding: str, value: bytes) -> tuple[int, str | None, tuple[int, ...] | None]:
    """Return how many bytes stand before an encoded ndarray's elements, and the dtype and shape they have."""
    dtype, shape = _ndarray_spec(encoding)
    at = 0
    if dtype is None:
        dtype = next((name for name, code in _DTYPE_CODES.items() if value and code == value[0]), None)
        at = 1
    if shape is None and len(value) > at:
        kind = np.dtype(_SHAPE_DTYPES[value[at] & 3])
        end = at + 1 + (value[at] >> 2) * kind.itemsize
        shape = tuple(np.frombuffer(value[at + 1 : end], kind).tolist())
        at = end
    return at, dtype, shape


def ndarray_spec(encoding: str) -> tuple[str | None, int | None]:
    """Return the dtype and the number of elements that an encoding fixes, each None where it leaves them open.

    >>> ndarray_spec("ndarray:uint16"), ndarray_spec("ndarray:uint16:2,3"), ndarray_spec("bytes")
    (('uint16', None), ('uint16', 6), (None, None))
    """
    dtype, shape = _ndarray_spec(encoding) if encoding.partition(":")[0] == "ndarray" else (None, None)
    return dtype, None if shape is None else int(np.prod(shape))


def row_lengths(
    shard: NDArray[np.uint8],
    encoding: str,
    dtype: str | np.dtype[Any],
    starts: NDArray[np.int64],
    sizes: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where the elements of each encoded value begin in the shard, and how many there are, both (n,) int64.

    Args:
        encoding: of the column: ``bytes`` or an ndarray, whose values must be rows of ``dtype``.
        starts, sizes: of the values, see ``column_spans``.
    Raises: DataError: if a value is something else, or announces another length than it has.
    """
    fixed_dtype, fixed_count = ndarray_spec(encoding)
    heads, item = np.zeros_like(sizes), np.dtype(dtype).itemsize
    if encoding != "bytes" and fixed_dtype is None:
        if len(sizes) and (sizes.min() < 1 or (shard[starts] != _DTYPE_CODES[np.dtype(dtype).name]).any()):
            raise DataError(f"not all of them are of {dtype}")
        heads += 1
    if encoding != "bytes" and fixed_count is None:
        announced = _announced(shard, starts + heads, sizes - heads)
        heads += 1 + announced[0]
        if (announced[1] * item != sizes - heads).any():
            raise DataError("their sizes are not the ones they announce")
    elif ((sizes - heads) % item).any():
        raise DataError(f"their sizes are no multiples of {item} bytes")
    return starts + heads, (sizes - heads) // item


def _announced(
    shard: NDArray[np.uint8], starts: NDArray[np.int64], sizes: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the bytes that each value takes to announce its length, and that length."""
    if len(sizes) and sizes.min() < 2:
        raise DataError("some are too short to announce a length")
    codes = shard[starts]
    if (codes >> 2 != 1).any():
        raise DataError("not all of them have one dimension")
    widths = np.left_shift(1, (codes & 3).astype(np.int64))
    if (widths >= sizes).any():
        raise DataError("some are too short to announce a length")
    lengths = np.zeros_like(sizes)
    for width, kind in ((1, "u1"), (2, "<u2"), (4, "<u4"), (8, "<i8")):
        rows = np.flatnonzero(widths == width)
        spans = (starts[rows] + 1)[:, None] + np.arange(width)
        lengths[rows] = shard[spans].view(kind).ravel()
    return widths, lengths


def decode_value(encoding: str, value: bytes) -> Any:
    """Return a value from its bytes; kinds that are not known here by streaming's own decoding, pickle by none.

    >>> decode_value("str", b"text"), decode_value("uint16", bytes(2)), decode_value("ndarray:int32:2", bytes(8))
    ('text', 0, array([0, 0], dtype=int32))
    """
    kind = encoding.partition(":")[0]
    if kind == "ndarray":
        start, dtype, shape = ndarray_prefix(encoding, value)
        return np.frombuffer(value, dtype, offset=start).reshape(shape or -1).copy()
    if kind == "int" or kind in _SCALARS:
        return np.frombuffer(value, "int64" if kind == "int" else kind)[0].item()
    if encoding in _DECODERS:
        return _DECODERS[encoding](value)
    from mixer.streaming_door import decode

    return decode(encoding, value)


_DECODERS: dict[str, Callable[[bytes], Any]] = {
    "bytes": bytes,
    "str": lambda value: value.decode("utf-8"),
    "json": json.loads,
    "str_int": int,
    "str_float": float,
    "str_decimal": lambda value: Decimal(value.decode("utf-8")),
}


def sample_values(shard: memoryview, row: int, columns: Mapping[str, str], wanted: Sequence[str]) -> list[Any]:
    """Return one sample's values of the wanted columns, decoded. The shard's offsets must have been checked."""
    begin, end = np.frombuffer(shard[4 + 4 * row : 12 + 4 * row], "<u4").tolist()
    names = sorted(columns)
    sizes = [encoded_size(columns[name]) for name in names]
    varying = sizes.count(None)
    announced = iter(np.frombuffer(shard[begin : begin + 4 * varying], "<u4").tolist())
    at, spans = begin + 4 * varying, {}
    for name, size in zip(names, sizes):
        width = next(announced) if size is None else size
        spans[name] = (at, at + width)
        at += width
    if at != end:
        raise DataError(f"sample {row} has columns of {at - begin:,} bytes in {end - begin:,}; the shard is damaged")
    return [decode_value(columns[name], bytes(shard[slice(*spans[name])])) for name in wanted]


def hash_hex(algorithm: str, data: Any) -> str:
    """Return the hex digest by any algorithm that streaming accepts (hashlib's fixed-length ones and xxhash's).

    >>> hash_hex("xxh64", b"domain")
    'ecf1d6f274aaae9c'
    """
    return hasher(algorithm, data).hexdigest()


def hasher(algorithm: str, data: Any = b"") -> Any:
    """Return a hash object (``update``, ``hexdigest``) of the named algorithm, fed with ``data``."""
    if algorithm.startswith("xxh"):
        import xxhash

        if algorithm in xxhash.algorithms_available:
            return getattr(xxhash, algorithm)(data)
    elif (
        hasattr(hashlib, algorithm) and algorithm in hashlib.algorithms_available and not algorithm.startswith("shake_")
    ):
        return getattr(hashlib, algorithm)(data)
    raise InputError(f"no hash algorithm {algorithm!r}; use for example 'xxh64', 'xxh3_128', 'sha256' or 'md5'.")


def compression_extension(compression: str) -> str:
    """Return the file extension of ``zstd:3``: ``zstd``."""
    return compression.partition(":")[0]


def compress(compression: str, data: Raw) -> bytes:
    """Compress shard bytes by ``zstd`` or ``zstd:LEVEL`` (1–22; default 3).

    The frame carries a checksum, so that a flipped bit is found even where no hash is recorded.
    """
    kind, _, level = compression.partition(":")
    if kind != "zstd" or (level and not (level.isdigit() and 1 <= int(level) <= 22)):
        raise InputError(f"cannot compress by {compression!r}; use 'zstd' or 'zstd:1' … 'zstd:22'.")
    import zstandard

    return zstandard.ZstdCompressor(level=int(level or 3), write_checksum=True).compress(data)


# --- one value -----------------------------------------------------------------------------------------------------


def _encode_scalar(dtype: str) -> Callable[[Any], bytes]:
    return lambda value: np.dtype(dtype).type(value).tobytes()


_ENCODERS: dict[str, Callable[[Any], bytes]] = {
    "bytes": bytes,
    "str": lambda value: value.encode("utf-8"),
    "int": lambda value: np.int64(value).tobytes(),
    "json": lambda value: json.dumps(value.tolist() if isinstance(value, np.ndarray) else value).encode("utf-8"),
    "str_int": lambda value: str(int(value)).encode("utf-8"),
    "str_float": lambda value: str(float(value)).encode("utf-8"),
    "str_decimal": lambda value: str(Decimal(value)).encode("utf-8"),
    **{dtype: _encode_scalar(dtype) for dtype in _SCALARS},
}


def _encode_value(name: str, encoding: str, value: Any) -> bytes:
    if isinstance(value, bytes):  # as in MDSWriter, bytes are taken as encoded already
        return _fitting(name, encoding, value)
    if encoding.partition(":")[0] == "ndarray":
        return _encode_ndarray(name, encoding, np.asarray(value))
    if encoding not in _ENCODERS:
        raise InputError(
            f"column {name!r} has encoding {encoding!r}, which is not written here; known are 'ndarray…',"
            f" {sorted(_ENCODERS)}. Give its values as encoded bytes."
        )
    try:
        return _ENCODERS[encoding](value)
    except (AttributeError, TypeError, ValueError, OverflowError, ArithmeticError) as error:
        raise InputError(f"column {name!r} ({encoding}) cannot hold {value!r:.80}: {error}.") from error


def _fitting(name: str, encoding: str, value: bytes) -> bytes:
    size = encoded_size(encoding)
    if size is not None and len(value) != size:
        raise InputError(f"column {name!r} ({encoding}) takes {size} bytes per sample, got {len(value)}.")
    return value


def _ndarray_spec(encoding: str) -> tuple[str | None, tuple[int, ...] | None]:
    parts = encoding.split(":")[1:]
    try:
        dtype = parts[0] if parts else None
        shape = tuple(int(size) for size in parts[1].split(",")) if len(parts) > 1 else None
    except ValueError:
        dtype, shape = "?", None
    if len(parts) > 2 or (dtype is not None and dtype not in _DTYPE_CODES) or (shape is not None and min(shape) < 1):
        raise InputError(
            f"{encoding!r} is not an ndarray encoding; write for example 'ndarray:uint16:2048', 'ndarray:int32' or"
            " 'ndarray'."
        )
    return dtype, shape


def _encode_ndarray(name: str, encoding: str, value: NDArray[Any]) -> bytes:
    dtype, shape = _ndarray_spec(encoding)
    if (
        value.dtype.name != (dtype or value.dtype.name)
        or value.dtype.name not in _DTYPE_CODES
        or value.size == 0
        or value.ndim == 0
        or value.shape != (shape or value.shape)
    ):
        raise InputError(
            f"column {name!r} ({encoding}) cannot hold an array of dtype {value.dtype} and shape {value.shape}; it"
            " needs the declared dtype and shape and at least one element."
        )
    head = b"" if dtype else bytes([_DTYPE_CODES[value.dtype.name]])
    if shape is None:
        code = next(code for code, kind in enumerate(_SHAPE_DTYPES) if max(value.shape) <= np.iinfo(kind).max)
        head += bytes([value.ndim << 2 | code]) + np.array(value.shape, _SHAPE_DTYPES[code]).tobytes()
    return head + value.tobytes()


# --- many samples --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ragged:
    """Vectors of different lengths: all ``values`` one after another, and the length of each."""

    values: NDArray[Any]
    lengths: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.lengths)


def _as_table(names: list[str], samples: Any) -> dict[str, Any]:
    """Return name → n values from any of the three forms that ``encode_shard`` takes."""
    if isinstance(samples, np.ndarray):
        if len(names) != 1:
            raise InputError(
                f"an array of samples fits one column, these are {len(names)}: {names}. Give a mapping from name to"
                " values."
            )
        return {names[0]: samples}
    if isinstance(samples, Mapping):
        table = dict(samples)
    else:
        table = {name: [sample.get(name, _MISSING) for sample in samples] for name in names}
    lengths = {name: len(values) for name, values in table.items()}
    missing = [name for name in names if name not in table or _lacks_some(table[name])]
    if missing or set(table) != set(names) or len(set(lengths.values())) > 1:
        raise InputError(f"samples do not fit the columns {names}: values by column {lengths}, missing {missing}.")
    return table


_MISSING = object()


def _lacks_some(values: Any) -> bool:
    return not isinstance(values, np.ndarray | Ragged) and any(value is _MISSING for value in values)


def _encode_fixed(
    names: list[str], columns: Mapping[str, str], table: Mapping[str, Any]
) -> tuple[int, int, memoryview]:
    """Encode samples whose columns all have a fixed size, as one (n, bytes) matrix; not copied if it is one array."""
    blocks = [_fixed_block(name, columns[name], table[name]) for name in names]
    matrix = blocks[0] if len(blocks) == 1 else np.concatenate(blocks, axis=1)
    return len(matrix), matrix.shape[1], matrix.data


def _fixed_block(name: str, encoding: str, values: Any) -> NDArray[np.uint8]:
    size = encoded_size(encoding) or 0
    if not isinstance(values, np.ndarray):
        return np.frombuffer(b"".join(_encode_value(name, encoding, value) for value in values), np.uint8).reshape(
            len(values), size
        )
    dtype, shape = (
        _ndarray_spec(encoding) if encoding.startswith("ndarray") else ("int64" if encoding == "int" else encoding, ())
    )
    if values.dtype != np.dtype(dtype) or values.shape[1:] != shape:
        raise InputError(
            f"column {name!r} ({encoding}) takes an array (n, {shape}) of {dtype}, got {values.shape} of"
            f" {values.dtype}."
        )
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).reshape(len(values), size)


class _Encoded(NamedTuple):
    """A column's values: one or more runs of n buffers, which stand one after another, and the bytes of each value."""

    runs: list[Sequence[Any]]
    sizes: NDArray[np.int64]


def _encode_rows(
    names: list[str], columns: Mapping[str, str], table: Mapping[str, Any]
) -> tuple[NDArray[np.int64], Iterator[Any]]:
    """Return the bytes of each sample, and all buffers that make up the samples: nothing large is copied here."""
    encoded = [_encode_column(name, columns[name], table[name]) for name in names]
    varying = [values.sizes for name, values in zip(names, encoded) if encoded_size(columns[name]) is None]
    heads = _pieces(np.stack(varying, axis=1).astype("<u4"))
    runs = [run for values in encoded for run in values.runs]
    sizes = sum((values.sizes for values in encoded), start=np.full(len(heads), 4 * len(varying), np.int64))
    return sizes, itertools.chain.from_iterable(zip(heads, *runs))


def _pieces(rows: NDArray[Any]) -> list[memoryview]:
    """Return the bytes of each row of an array."""
    data = np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data
    size = len(data) // max(len(rows), 1)
    return [data[at : at + size] for at in range(0, len(data), size)] if size else []


def _encode_column(name: str, encoding: str, values: Any) -> _Encoded:
    """Return each value's bytes; those of an array, and vectors of the declared dtype, without a look at each."""
    dtype, shape = _ndarray_spec(encoding) if encoding.startswith("ndarray:") else (None, None)
    is_scalar = encoding in _SCALARS
    if isinstance(values, np.ndarray) and (is_scalar or shape) and values.dtype == (dtype or encoding):
        block = _fixed_block(name, encoding, values)
        return _Encoded([_pieces(block)], np.full(len(block), block.shape[1], np.int64))
    wanted = np.dtype(dtype) if dtype is not None and shape is None else None
    if isinstance(values, Ragged):
        if values.values.dtype != wanted or values.lengths.min(initial=1) < 1:
            raise InputError(f"column {name!r} ({encoding}) cannot hold empty vectors, or {values.values.dtype}.")
        return _encode_vectors(values)
    if wanted is not None and all(
        isinstance(value, np.ndarray) and value.dtype == wanted and value.ndim == 1 and value.size for value in values
    ):
        lengths = np.fromiter(map(len, values), np.int64, len(values))
        return _encode_vectors(Ragged(np.concatenate([np.empty(0, wanted), *values]), lengths))
    encoded = [_encode_value(name, encoding, value) for value in values]
    return _Encoded([encoded], np.fromiter(map(len, encoded), np.int64, len(encoded)))


def _encode_vectors(vectors: Ragged) -> _Encoded:
    """Return vectors of any length, each behind its shape."""
    lengths, data = vectors.lengths, np.ascontiguousarray(vectors.values).view(np.uint8).data
    codes = np.where(lengths < 1 << 8, 0, np.where(lengths < 1 << 16, 1, 2))
    shapes = [bytes((4 | code,)) + n.to_bytes(1 << code, "little") for n, code in zip(lengths.tolist(), codes.tolist())]
    ends = np.cumsum(lengths) * vectors.values.itemsize
    starts = ends - lengths * vectors.values.itemsize
    pieces = [data[start:end] for start, end in zip(starts.tolist(), ends.tolist())]
    return _Encoded([shapes, pieces], 1 + (1 << codes) + ends - starts)


# --- JSON ----------------------------------------------------------------------------------------------------------


def _config(
    columns: Mapping[str, str], compression: str | None, hashes: Sequence[str], size_limit: int | None
) -> dict[str, Any]:
    if list(hashes) != sorted(set(hashes)):
        raise InputError(f"hashes must be sorted and unique, as mosaicml-streaming demands; got {list(hashes)}.")
    names = sorted(columns)
    return {
        "version": 2,
        "format": "mds",
        "compression": compression,
        "hashes": list(hashes),
        "size_limit": size_limit,
        "column_names": names,
        "column_encodings": [columns[name] for name in names],
        "column_sizes": [encoded_size(columns[name]) for name in names],
    }


def _config_bytes(
    columns: Mapping[str, str], compression: str | None, hashes: Sequence[str], size_limit: int | None
) -> bytes:
    return json.dumps(_config(columns, compression, hashes, size_limit), sort_keys=True).encode("utf-8")


def _file_info(basename: str, data: Raw | Mapping[str, Any], hashes: Sequence[str]) -> dict[str, Any]:
    if isinstance(data, Mapping):
        return {"basename": basename, "bytes": int(data["bytes"]), "hashes": dict(data["hashes"])}
    return {
        "basename": basename,
        "bytes": len(data),
        "hashes": {algorithm: hash_hex(algorithm, data) for algorithm in hashes},
    }
