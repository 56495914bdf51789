"""The samples of one domain that lies elsewhere: shards come into a cache folder as they are needed.

A shard is fetched, checked and mapped in one go, while its place in the cache is claimed; so it cannot be evicted
between two of these steps, by whichever process.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mixer.cache import RemoteCache
from mixer.errors import DataError
from mixer.shards import DomainShards, Indices, View

__all__ = ["RemoteShards"]


class RemoteShards(DomainShards):
    """``DomainShards`` in front of a remote folder.

    Args:
        cache: where shards come from, and the folder that keeps them.
        path: of the MDS folder in the cache. Other arguments are those of ``DomainShards``.
    """

    cache: RemoteCache  # type: ignore[assignment]  # here there always is one

    def __init__(self, domain: str, split: str, path: str, *, cache: RemoteCache, **options: Any) -> None:
        self.cache, self.path = cache, path
        super().__init__(domain, split, cache.local / path, **options)
        if cache.limit is not None:
            cache.space.register({self._name(i): size for i, size in enumerate(self.index.raw_bytes.tolist())})

    def keep(self, shards: Iterable[int]) -> None:
        wanted = list(shards)
        self.cache.space.want(self.domain, [self._name(shard) for shard in wanted])
        super().keep(wanted)

    def window_bytes(self, shards: Indices) -> int:
        """Return the bytes that these shards take when raw, and that their fetching takes on top at a time."""
        return int(self.index.raw_bytes[shards].sum() + self.index.zip_bytes[shards].max(initial=0))

    # --- one shard -------------------------------------------------------------------------------------------------

    def _name(self, shard: int) -> str:
        return f"{self.path}/{self.index.raw_name(shard)}"

    def _open(self, shard: int) -> View:
        view = self._opened(shard, ahead=False)
        assert view is not None
        return view

    def _open_ahead(self, shard: int) -> View | None:
        """Open a shard, unless that would evict others that will be read before it."""
        return self._opened(shard, ahead=True)

    def _opened(self, shard: int, *, ahead: bool) -> View | None:
        if not self.shard_sizes[shard]:
            return super()._open(shard)
        view = self._view_if_here(shard)
        if view is not None:
            return view
        try:
            with self.cache.lock(self._name(shard)):
                view = self._view_if_here(shard)  # another process or thread may have fetched it meanwhile
                return view or self._fetched(shard, ahead=ahead)
        except DataError as error:
            known = str(error).startswith("domain ")
            raise error if known else DataError(f"domain {self.domain!r}, shard {self._at(shard)}: {error}") from error
        except OSError as error:
            raise DataError(
                f"domain {self.domain!r}, shard {self._at(shard)}: cannot be kept in the cache: {error.strerror}. Free"
                " space there, set a cache_limit that fits the disk, or use another folder."
            ) from error

    def _at(self, shard: int) -> Path:
        return self.folder / self.index.raw_name(shard)

    def _view_if_here(self, shard: int) -> View | None:
        """Return the view of a shard that is in the cache in full and undamaged."""
        path = self._at(shard)
        try:
            if path.stat().st_size != self.index.raw_bytes[shard]:
                return None
            view = self._checked_view(shard, path)
        except (OSError, DataError):
            return None  # evicted at this moment, or damaged: a copy of something that can be had again
        self.cache.space.count(hits=1)
        return view

    def _fetched(self, shard: int, *, ahead: bool) -> View | None:
        index, space = self.index, self.cache.space
        size_bytes = int(index.raw_bytes[shard] + index.zip_bytes[shard])
        with space.claim(self._name(shard), size_bytes, ahead=ahead) as folder:
            if folder is None:
                return None
            path, target = self._fetch_raw(shard, folder), self._at(shard)
            view = self._checked_view(shard, path)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
            self._note_checked(shard)
            return view

    def _note_checked(self, shard: int) -> None:
        """A file that was checked and then renamed has another time of change: let no process check it again."""
        digest = self.index.raw_hashes[shard]
        if self.checked is not None and digest:
            self.checked.note(self._as_checked(self._at(shard).stat(), digest))

    def _fetch_raw(self, shard: int, folder: Path) -> Path:
        """Return the raw shard, fetched into a folder, and decompressed there if it comes compressed."""
        index, zip_name = self.index, self.index.zip_name(shard)
        raw_bytes, raw_hash = int(index.raw_bytes[shard]), index.raw_hashes[shard]
        if zip_name is None:
            return self._bring(index.raw_name(shard), folder, raw_bytes, raw_hash)
        zipped = self._bring(zip_name, folder, int(index.zip_bytes[shard]), index.zip_hashes[shard])
        raw = folder / "raw"
        raw.write_bytes(self._decompressed(zipped, raw_bytes))
        zipped.unlink()
        return raw

    def _bring(self, name: str, folder: Path, size_bytes: int, digest: bytes) -> Path:
        return self.cache.bring(f"{self.path}/{name}", folder, lambda path: self._check_file(path, size_bytes, digest))

    def _raw_content(self, shard: int) -> memoryview:
        path = self._at(shard)
        try:
            return self._map(path, int(self.index.raw_bytes[shard]))
        except DataError:
            with self.cache.lock(self._name(shard)), self.cache.space.claim(self._name(shard), 0) as folder:
                assert folder is not None
                fetched = self._fetch_raw(shard, folder)
                os.replace(fetched, path)
                return self._map(path, int(self.index.raw_bytes[shard]))
