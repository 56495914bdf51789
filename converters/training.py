"""Train a byte-level BPE tokenizer on a sample of the corpus, the same file in every run.

The sample holds the documents with the smallest seeded hashes, the same number of bytes from every domain, so that
rare domains shape the vocabulary too, and the order or cutting of the inputs does not.
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import xxhash

from converters.locations import Location, write_whole
from converters.options import StageOptions, size_in_bytes
from converters.plan import Unit, make_plan
from converters.readers import Bad
from converters.stage import documents_of
from mixer.errors import InputError
from mixer.outputs import check_file

__all__ = ["END_OF_TEXT", "sample_documents", "train_tokenizer", "trained_tokenizer"]

END_OF_TEXT = "<|endoftext|>"
SAMPLE_BYTES = 64 << 20


def trained_tokenizer(units: Sequence[Unit], options: StageOptions, folder: Location) -> Location:
    """Return ``folder/tokenizer.json``, trained now unless it is there."""
    file = folder / "tokenizer.json"
    if not file.exists():
        assert options.train_tokenizer is not None
        texts = sample_documents(units, options, SAMPLE_BYTES)
        if not texts:
            raise InputError("no text to train a tokenizer on.")
        write_whole(file, train_bpe(texts, options.train_tokenizer).encode("utf-8"))
    return file


def train_tokenizer(
    inputs: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    vocab_size: int,
    sample_size: str | int = SAMPLE_BYTES,
    **options: Any,
) -> Path:
    """Train a byte-level BPE on a sample of the inputs and write its ``tokenizer.json`` to ``out``.

    Args:
        vocab_size: ids, the end of text included.
        sample_size: bytes of text to train on, spread evenly over the domains.
        options: ``domain``, ``text_field``, ``format``, ``include``, ``exclude``, ``seed``… as for ``convert``.
    """
    check_file(out)
    checked = StageOptions(**options, train_tokenizer=vocab_size)
    texts = sample_documents(make_plan(inputs, checked, {}).units, checked, size_in_bytes(sample_size, "sample_size"))
    if not texts:
        raise InputError("no text to train a tokenizer on.")
    path = Path(out)
    write_whole(path, train_bpe(texts, vocab_size).encode("utf-8"))
    return path


def sample_documents(units: Sequence[Unit], options: StageOptions, sample_bytes: int) -> list[str]:
    """Return texts of about ``sample_bytes`` in all, spread evenly over the domains that have enough.

    Of each domain no more is held than its share may be by what was read so far, which only becomes less.
    """
    domains: dict[str, _SmallestHashes] = {}
    share, held = sample_bytes, 0
    for unit in units:
        for piece in unit.pieces:
            for document in documents_of(piece, options):
                if not isinstance(document, Bad) and document.text:
                    found = domains.setdefault(document.domain, _SmallestHashes())
                    held += found.add(document.text, options.seed, share)
                if held > 2 * sample_bytes:
                    share = _even_share([each.size for each in domains.values()], sample_bytes)
                    held = sum(each.shrink(share) for each in domains.values())
    share = _even_share([each.size for each in domains.values()], sample_bytes)
    texts: list[str] = []
    left = sample_bytes
    # Smallest domains first: what they cannot use is shared among the rest.
    for place, name in enumerate(sorted(domains, key=lambda name: (min(domains[name].size, share), name))):
        budget = left // (len(domains) - place)
        for text in domains[name].texts():
            if budget <= 0:
                break
            cut = text[:budget]
            texts.append(cut)
            budget -= len(cut)
            left -= len(cut)
    return texts


def _even_share(sizes: Sequence[int], total: int) -> int:
    """Return the most that any may give if together they give ``total``, each as evenly as it can.

    >>> _even_share([10, 100, 100], 110), _even_share([10, 10], 110)
    (50, 110)
    """
    left = total
    for place, size in enumerate(sorted(sizes)):
        share = -(-left // (len(sizes) - place))
        if size >= share:
            return share
        left -= size
    return total


class _SmallestHashes:
    """The documents of a domain with the smallest hashes, just enough of them, and of each, to fill a share."""

    def __init__(self) -> None:
        self.size = 0
        self._heap: list[tuple[int, str]] = []

    def add(self, text: str, seed: int, share: int) -> int:
        """Take a document if it is among them; return how many characters more there are."""
        key = xxhash.xxh3_64_intdigest(text.encode("utf-8"), seed)
        if self.size >= share and -self._heap[0][0] <= key:
            return 0
        before, text = self.size, text[:share]
        heapq.heappush(self._heap, (-key, text))
        self.size += len(text)
        return self.shrink(share) - before

    def shrink(self, share: int) -> int:
        """Leave out what a smaller share has no room for; return how many characters there are."""
        while self._heap and self.size - len(self._heap[0][1]) >= share:
            self.size -= len(heapq.heappop(self._heap)[1])
        return self.size

    def texts(self) -> Iterator[str]:
        return (text for _, text in sorted(self._heap, reverse=True))


def train_bpe(texts: Sequence[str], vocab_size: int) -> str:
    """Return the JSON of a byte-level BPE of ``vocab_size`` ids, the first of which is the end of text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str(pretty=True)
