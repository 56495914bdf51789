"""Put values per sample beside finished shards, from a table, from arrays, or from what ``mixer score`` wrote.

    mixer add-column shards quality --from quality.parquet          # columns domain, sample_id and quality
    mixer add-column shards quality --from web=web.npy --from code=code.npy
    mixer add-column shards reference_loss --from scores

A sample is named by its domain and its number there, which is what the loader calls ``sample_ids`` and the column
``sample_id`` holds. Each must have one value. What is written is described in ``mixer.side_columns``.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters.files import compression_suffix, status
from converters.inspecting import read_index
from converters.readers import FORMATS, Bad, Piece, Row, place
from mixer.errors import DataError, InputError
from mixer.manifest import Manifest, domain_folder
from mixer.side_columns import SideColumn, column_folder, file_digest, shards_facts

__all__ = ["DTYPES", "add_column"]

DTYPES = ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32")
_TABLES = ("parquet", "arrow", "jsonl", "csv", "tsv")
_TAKEN = ("input_ids", "domain_ids", "sample_ids", "labels", "attention_mask", "lengths")


def add_column(
    shards: str | os.PathLike[str],
    name: str,
    sources: Sequence[str | os.PathLike[str]],
    *,
    split: str = "train",
    dtype: str = "float32",
    fill: float | None = None,
    replace: bool = False,
) -> Path:
    """Write a column beside the shards and return its folder.

    Args:
        shards: folder with a manifest.
        name: of the column; letters, digits, ``_`` and ``-``.
        sources: tables (Parquet, Arrow, JSON lines, CSV, TSV) with the columns ``sample_id``, ``name`` and, unless the
            source is written ``domain=path``, ``domain``; ``domain=path.npy`` with one row per sample; or one folder
            that ``mixer score`` wrote.
        split: whose samples the values belong to.
        dtype: one of ``DTYPES``; for a folder and for arrays their own.
        fill: value of samples that no source names; None makes them an error.
        replace: overwrite a column of that name.
    Raises: InputError, DataError: naming the source and the row, domain or sample that does not fit.
    """
    manifest, target = Manifest.load(shards), column_folder(shards, name, split)
    _check_name(Path(shards), manifest, name, split)
    if target.exists() and not replace:
        raise InputError(f"there is a column {name!r} beside {split} of {shards} already; --replace overwrites it.")
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is not one of {list(DTYPES)}.")
    if not sources:
        raise InputError("no values are given: name a table, arrays or a folder by --from.")
    partial = target.with_name(f".{split}.{os.getpid()}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        if (Path(sources[0]) / "run.json").is_file():
            _copy_column(manifest, split, sources, partial)
        else:
            values = _collect(manifest, name, split, [os.fspath(source) for source in sources], dtype, fill)
            _write(Path(shards), manifest, name, split, values, partial)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _check_name(shards: Path, manifest: Manifest, name: str, split: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][\w-]{0,99}", name, re.ASCII) or name in _TAKEN:
        raise InputError(f"a column cannot be called {name!r}: take letters, digits, '_' and '-', and not {_TAKEN}.")
    domains = [domain for domain in manifest.names if split in manifest.domains[domain].splits]
    if not domains:
        raise InputError(f"no domain of {shards} has a split {split!r}.")
    inside = read_index(shards / manifest.split(domains[0], split).path)[0]["column_names"]
    if name in inside:
        raise InputError(f"the shards themselves have a column {name!r}; they have {inside}. Choose another name.")


def _copy_column(manifest: Manifest, split: str, sources: Sequence[Any], partial: Path) -> None:
    if len(sources) > 1:
        raise InputError(f"a folder of `mixer score` is a whole column; {len(sources)} sources are given.")
    column = SideColumn(sources[0])
    column.check(manifest, split)
    for domain, files in column.files.items():
        for shard, (file, _, digest) in enumerate(files):
            path = column.path(domain, shard)
            copy = partial / domain_folder(domain) / file
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
            if file_digest(copy) != digest:
                raise DataError(f"{path} is damaged. Run `mixer {column.command}` again.")
    for file in ("run.json", "result.json"):
        shutil.copyfile(column.folder / file, partial / file)


# --- values --------------------------------------------------------------------------------------------------------


def _collect(
    manifest: Manifest, name: str, split: str, sources: Sequence[str], dtype: str, fill: float | None
) -> dict[str, NDArray[Any]]:
    """Return the values of each domain, (samples, …)."""
    sizes = {d: manifest.split(d, split).num_samples for d in manifest.names if split in manifest.domains[d].splits}
    values: dict[str, NDArray[Any]] = {}
    given = {domain: np.zeros(size, np.bool_) for domain, size in sizes.items()}
    for source in sources:
        domain, equals, path = source.partition("=")
        if os.path.exists(source) or not equals:
            domain, path = "", source
        elif domain not in sizes:
            raise InputError(f"{source}: no domain {domain!r} with a split {split!r}; there are {sorted(sizes)}.")
        if path.endswith(".npy"):
            values[domain] = _array(source, path, sizes.get(domain))
            given[domain][:] = True
        else:
            for rows in _batched(_rows(path, domain, name, fill is not None)):
                if not _put_at_once(rows, values, given, sizes, dtype):
                    for at, domain_, sample, value in rows:  # to name the row that does not fit
                        _put(f"{path}, {at}", values, given, sizes, dtype, domain_, sample, value)
    for domain, size in sizes.items():
        missing = np.flatnonzero(~given[domain])
        if len(missing) and fill is None:
            raise InputError(
                f"{len(missing):,} of {size:,} samples of domain {domain!r} have no value, the first is"
                f" {missing[0]:,}. Give all, or one for the others by --fill."
            )
        if domain not in values:
            values[domain] = np.zeros(size, dtype)
        if len(missing):
            values[domain][missing] = _fitting("--fill", dtype, fill)
    if len({(table.dtype, table.shape[1:]) for table in values.values()}) > 1:
        shapes = {domain: f"{table.dtype} {table.shape[1:]}" for domain, table in values.items()}
        raise InputError(f"a column has values of one kind in all domains; these are {shapes}.")
    return values


def _array(source: str, path: str, size: int | None) -> NDArray[Any]:
    if size is None:
        raise InputError(f"{source}: an array belongs to one domain; write domain={path}.")
    try:
        table = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path} as an array: {error}.") from error
    if table.dtype.name not in DTYPES or table.ndim < 1 or len(table) != size:
        raise InputError(f"{path} holds {table.dtype} {table.shape}; {size:,} rows of one of {DTYPES} were expected.")
    if table.dtype.kind == "f" and not np.isfinite(table).all():
        raise DataError(f"{path}: the value of sample {np.argwhere(~np.isfinite(table))[0][0]:,} is not finite.")
    return table


_TableRow = tuple[str, Any, Any, Any]  # place, domain, sample number, value


def _rows(path: str, domain: str, name: str, may_be_null: bool) -> Iterator[_TableRow]:
    """Yield place, domain, sample number and value of every row of a table, or of those that have a value."""
    plain = path.lower().removesuffix(compression_suffix(path.lower()))
    kind = next((kind for kind in _TABLES if plain.endswith(FORMATS[kind].extensions)), None)
    if kind is None:
        raise InputError(f"{path} is no table of a known kind ({', '.join(_TABLES)}), no .npy and no folder of scores.")
    try:
        piece = Piece(path, Path(path).name, "", kind, status(path).size_bytes)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}.") from error
    for row in FORMATS[kind].read(piece, frozenset(("domain", "sample_id", name))):
        where = place(piece, row.at)
        if isinstance(row, Bad):
            raise DataError(f"{path}, {where}: {row.detail}.")
        if may_be_null and row.fields.get(name, 0) is None:
            continue
        yield where, *_fields(row, domain, name, f"{path}, {where}")


def _fields(row: Row, domain: str, name: str, where: str) -> tuple[Any, Any, Any]:
    missing = [key for key in ("sample_id", name, *(() if domain else ("domain",))) if row.fields.get(key) is None]
    if missing:
        raise InputError(f"{where}: no value for {missing}; the row has {sorted(row.fields)}.")
    return domain or row.fields["domain"], row.fields["sample_id"], row.fields[name]


def _batched(rows: Iterator[_TableRow]) -> Iterator[list[_TableRow]]:
    while batch := list(itertools.islice(rows, 1 << 16)):
        yield batch


def _put_at_once(
    rows: Sequence[_TableRow],
    values: dict[str, NDArray[Any]],
    given: Mapping[str, NDArray[np.bool_]],
    sizes: Mapping[str, int],
    dtype: str,
) -> bool:
    """Put the values of many rows; return False, with nothing put, unless all of them fit."""
    _, domains, samples, found = zip(*rows)
    try:
        numbers = np.array(samples)
        numbers = numbers.astype(np.int64) if numbers.dtype.kind == "U" else numbers
        table = _fitting("", dtype, list(found))
        names = np.array(domains)
    except (InputError, ValueError, OverflowError):
        return False
    if numbers.dtype.kind not in "iu" or numbers.ndim != 1 or not set(domains) <= sizes.keys():
        return False
    places = [(str(name), np.flatnonzero(names == name)) for name in np.unique(names)]
    for name, here in places:
        mine, shape = numbers[here], values[name].shape[1:] if name in values else table.shape[1:]
        fits = mine.min() >= 0 and mine.max() < sizes[name] and shape == table.shape[1:]
        if not fits or given[name][mine].any() or len(np.unique(mine)) < len(mine):
            return False
    for name, here in places:
        if name not in values:
            values[name] = np.zeros((sizes[name], *table.shape[1:]), dtype)
        values[name][numbers[here]], given[name][numbers[here]] = table[here], True
    return True


def _put(
    where: str,
    values: dict[str, NDArray[Any]],
    given: Mapping[str, NDArray[np.bool_]],
    sizes: Mapping[str, int],
    dtype: str,
    domain: Any,
    sample: Any,
    value: Any,
) -> None:
    if domain not in sizes:
        raise InputError(f"{where}: no domain {domain!r} with this split; there are {sorted(sizes)}.")
    number = int(sample) if re.fullmatch(r"\d+", str(sample)) else -1
    if not 0 <= number < sizes[domain]:
        raise InputError(f"{where}: domain {domain!r} has samples 0 to {sizes[domain] - 1:,}, not {sample!r}.")
    if given[domain][number]:
        raise InputError(f"{where}: a second value for sample {number:,} of domain {domain!r}.")
    fitting = _fitting(where, dtype, value)
    if domain not in values:
        values[domain] = np.zeros((sizes[domain], *fitting.shape), dtype)
    if fitting.shape != values[domain].shape[1:]:
        raise InputError(f"{where}: a value of shape {fitting.shape}, those before have {values[domain].shape[1:]}.")
    values[domain][number], given[domain][number] = fitting, True


def _fitting(where: str, dtype: str, value: Any) -> NDArray[Any]:
    """Return a number, or a list of them, in the dtype of the column; an integer column takes only what it can hold."""
    try:
        wide = np.asarray(value, np.float64 if np.dtype(dtype).kind == "f" else None)
        if wide.dtype.kind in "US":
            wide = np.asarray(value, np.int64)
        with np.errstate(over="ignore", invalid="ignore"):
            narrow = wide.astype(dtype)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{where}: {value!r:.60} is no value of {dtype} ({error}).") from error
    is_float = np.dtype(dtype).kind == "f"
    if not (np.isfinite(narrow).all() or where == "--fill") if is_float else not (narrow == wide).all():
        raise InputError(f"{where}: {value!r:.60} does not fit into {dtype}, or is not finite.")
    return narrow


def _write(
    shards: Path, manifest: Manifest, name: str, split: str, values: Mapping[str, NDArray[Any]], partial: Path
) -> None:
    files: dict[str, list[list[Any]]] = {}
    for domain, table in sorted(values.items()):
        folder = partial / domain_folder(domain)
        folder.mkdir()
        first, files[domain] = 0, []
        for number, entry in enumerate(read_index(shards / manifest.split(domain, split).path)):
            path = folder / f"{number:05}.npy"
            np.save(path, table[first : first + entry["samples"]])
            files[domain].append([path.name, entry["samples"], file_digest(path)])
            first += entry["samples"]
    table = next(iter(values.values()))
    kind = {"kind": "sample", "dtype": table.dtype.name, "shape": list(table.shape[1:])}
    settings = {"command": "add-column", "column": name, **kind, **shards_facts(manifest, split)}
    for file, content in (("run.json", settings), ("result.json", {"files": files})):
        (partial / file).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
