"""Values per sample that lie beside the shards, in one file per shard, and are bound to them by fingerprints.

    shards/.columns/quality/train/run.json             what it is, and the fingerprints of the shards it belongs to
    shards/.columns/quality/train/<domain>/00000.npy   one row per sample of the domain's shard 00000
    shards/.columns/quality/train/result.json          digests; written last, so that a folder without it is unfinished

``mixer add-column`` writes such a column, ``MixtureLoader(columns=["quality"])`` delivers it, ``mixer verify`` checks
it. ``mixer score`` writes the same files to a folder of its own. The shards themselves stay as they are.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from mixer.errors import DataError, InputError
from mixer.manifest import Manifest, domain_folder
from mixer.mapping import map_file

__all__ = ["FOLDER", "SideColumn", "column_folder", "file_digest", "find_columns", "shards_facts"]

FOLDER = ".columns"
_AT_HAND = 1 << 14  # files mapped at a time; the kernel allows 65,530 in all


def column_folder(root: str | os.PathLike[str], name: str, split: str) -> Path:
    """Return where a column of a split lies below the folder of its shards."""
    return Path(root) / FOLDER / name / split


def find_columns(root: str | os.PathLike[str]) -> Iterator[tuple[str, str, Path]]:
    """Yield name, split and folder of every column beside the shards, also of those that are not finished."""
    for folder in sorted((Path(root) / FOLDER).glob("*/*")):
        if not folder.name.startswith("."):
            yield folder.parent.name, folder.name, folder


def shards_facts(manifest: Manifest, split: str) -> dict[str, Any]:
    """Return what values per sample depend on: they belong to these very shards."""
    domains = [name for name in manifest.names if split in manifest.domains[name].splits]
    return {
        "split": split,
        "seq_len": manifest.seq_len,
        "tokenizer": manifest.tokenizer.fingerprint,
        "shards": {name: manifest.split(name, split).fingerprint for name in domains},
    }


def file_digest(path: Path) -> str:
    """Return ``xxh3:`` and the hash of a file's bytes."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return f"xxh3:{digest.hexdigest()}"


class SideColumn:
    """One column, looked up by domain and sample number; every file is checked against its digest when first used.

    Args:
        folder: with ``run.json``, ``result.json`` and the files.
    Raises: InputError: if it is unfinished, damaged or something else.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.settings: dict[str, Any] = self._read("run.json")
        self.files: dict[str, list[list[Any]]] = self._read("result.json").get("files", {})
        if "shards" not in self.settings or not self.files:
            raise InputError(f"{self.folder} holds no values per sample. Give what `mixer add-column` wrote.")
        self.domains = tuple(sorted(self.files))
        self._firsts = {name: np.cumsum([0, *(size for _, size, _ in rows)]) for name, rows in self.files.items()}
        self._tables: dict[tuple[str, int], NDArray[Any]] = {}

    def _read(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            what = "is unfinished" if (self.folder / "run.json").exists() else "holds no values per sample"
            raise InputError(f"{self.folder} {what}: run its command again.") from None
        except ValueError as error:
            raise InputError(f"{path} is damaged ({error}). Remove {self.folder} and run its command again.") from error
        if not isinstance(content, dict):
            raise InputError(f"{path} holds no object. Remove {self.folder} and run its command again.")
        return content

    @property
    def command(self) -> str:
        """The command that wrote it."""
        return str(self.settings.get("command", "add-column"))

    def check(self, manifest: Manifest, split: str) -> None:
        """Raise InputError unless the column belongs to these shards, naming both sides."""
        facts = shards_facts(manifest, split)
        for key, expected in facts.items():
            if self.settings.get(key) != expected:
                raise InputError(
                    f"{self.folder} belongs to {key} {self.settings.get(key)}, the shards have {expected}. Run"
                    f" `mixer {self.command}` for these shards."
                )

    def read(self, domain: str, samples: NDArray[np.int64]) -> NDArray[Any]:
        """Return the values (n, …) of samples (n,) of a domain, in the stored dtype.

        Raises: DataError: naming the file, if one is missing or damaged.
        """
        if domain not in self.files:
            raise DataError(f"{self.folder} has no values of domain {domain!r}; it has {list(self.domains)}.")
        firsts = self._firsts[domain]
        if len(samples) and samples.max() >= firsts[-1]:
            raise DataError(f"{self.folder} has {firsts[-1]} samples of {domain!r}; asked for number {samples.max()}.")
        shards = np.searchsorted(firsts, samples, side="right") - 1
        out: NDArray[Any] | None = None
        for shard in np.unique(shards).tolist():
            here, table = shards == shard, self._table(domain, shard)
            if out is None:
                out = np.empty((len(samples), *table.shape[1:]), table.dtype)
            out[here] = table[samples[here] - firsts[shard]]
        return self._empty(domain) if out is None else out

    def read_batch(
        self, domains: Sequence[str], domain_ids: NDArray[np.int64], samples: NDArray[np.int64]
    ) -> NDArray[Any]:
        """Return the values (n, …) of n samples; ``domain_ids`` (n,) index ``domains``."""
        out: NDArray[Any] | None = None
        for domain in np.unique(domain_ids).tolist():
            here = domain_ids == domain
            values = self.read(domains[domain], samples[here])
            if out is None:
                out = np.empty((len(samples), *values.shape[1:]), values.dtype)
            out[here] = values
        return self._empty(self.domains[0]) if out is None else out

    def _empty(self, domain: str) -> NDArray[Any]:
        return np.array(self._table(domain, 0)[:0])

    def _table(self, domain: str, shard: int) -> NDArray[Any]:
        key = (domain, shard)
        if key not in self._tables:
            path, digest = self.path(domain, shard), self.files[domain][shard][2]
            if not path.exists() or file_digest(path) != digest:
                raise DataError(
                    f"{path} is missing or damaged. Remove it and {self.folder / 'result.json'}, and run the same"
                    f" `mixer {self.command}` again."
                )
            if len(self._tables) >= _AT_HAND:
                del self._tables[next(iter(self._tables))]
            self._tables[key] = _mapped(path)
        return self._tables[key]

    def path(self, domain: str, shard: int) -> Path:
        """Return the file that holds the values of a shard."""
        return self.folder / domain_folder(domain) / str(self.files[domain][shard][0])

    def __getstate__(self) -> Mapping[str, Any]:
        return {**self.__dict__, "_tables": {}}


def _mapped(path: Path) -> NDArray[Any]:
    """Return the array of an ``.npy`` file where it lies, read-only; ``np.load`` would keep the file open."""
    with path.open("rb") as file:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        content = map_file(file.fileno(), os.fstat(file.fileno()).st_size)
        return np.frombuffer(content, dtype, math.prod(shape), file.tell()).reshape(shape)
