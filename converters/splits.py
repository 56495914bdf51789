"""How each domain is split into training and validation, and what each split amounts to.

Documents are held out by the hash of their text: the same ones for any order of inputs, and copies of a text land on
one side. Domains with too few documents give their last samples instead. Everything here is counted from the
documents' lengths and hashes alone; no token is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from converters.best_fit import lay_out, load_layout
from converters.options import PackOptions
from converters.shuffling import Shuffled, shuffled
from converters.stage import DOCUMENT, GIVEN, Part, UnitTable, parts_of
from converters.streams import HASHES, Stream, load_kept
from mixer.errors import InputError

__all__ = ["DomainPlan", "HeldOut", "SplitPlan", "choose_held_out", "held_out_samples", "plan_splits", "samples_of"]

_SIDES = ("all", "above", "below")
_LARGEST_FLOOR = 0.1  # the floor for tiny domains never takes more than a tenth


@dataclass(frozen=True)
class HeldOut:
    """How a domain's validation split is cut: by ``documents``, ``samples`` (the last ones) or ``nothing``.

    ``given`` means that the input was split already.
    """

    by: str
    share: float = 0.0
    threshold: int = 0

    def facts(self) -> dict[str, Any]:
        """Return what the manifest says of it; ``below`` is the threshold in hex, for extensions."""
        if self.by == "nothing":
            return {}
        below = {"below": f"{self.threshold:x}"} if self.by == "documents" else {}
        return {"by": self.by, "share": self.share, **below}

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> HeldOut:
        """Return it from the manifest."""
        return cls(facts.get("by", "nothing"), facts.get("share", 0.0), int(facts.get("below", "0"), 16))


class SplitPlan(NamedTuple):
    """One split of one domain: which samples of which stream, and what they amount to.

    ``layout`` is the file of a best-fit layout; without one, the samples follow one another from ``first_token`` on.
    """

    split: str
    stream: Stream | Shuffled
    first_sample: int
    num_samples: int
    num_documents: int
    tokens_in: int
    dropped_tokens: int
    padding_tokens: int
    layout: str | None = None
    first_token: int = 0

    @property
    def domain(self) -> str:
        return self.stream.domain.removesuffix(GIVEN)

    @property
    def num_tokens(self) -> int:
        """Tokens in its samples, padding included."""
        return self.tokens_in + self.padding_tokens - self.dropped_tokens


class DomainPlan(NamedTuple):
    """What a domain holds, how it is split, and what is wrong with that (empty: nothing)."""

    domain: str
    held_out: HeldOut
    splits: tuple[SplitPlan, ...]
    documents: int
    text_bytes: int
    problem: str


def choose_held_out(documents: int, below: int, smallest: Sequence[int], options: PackOptions) -> HeldOut:
    """Return how a domain of this many documents is split.

    By documents if enough of them hash below the share; if a higher threshold is needed to reach ``min_held_out``, it
    may take up to a tenth of the documents; else by samples.

    Args:
        documents: in the domain.
        below: how many hash below ``options.held_out``.
        smallest: the ``min_held_out`` smallest distinct hashes, sorted.

    >>> choose_held_out(5000, 52, [1, 2, 3, 4, 5, 6, 7, 8], PackOptions(512, held_out=0.01)).by
    'documents'
    >>> choose_held_out(2, 0, [1, 2], PackOptions(512, held_out=0.01)).by
    'samples'
    """
    if options.held_out == 0:
        return HeldOut("nothing")
    if below >= options.min_held_out:
        return HeldOut("documents", options.held_out, int(options.held_out * HASHES))
    if documents * _LARGEST_FLOOR >= options.min_held_out and len(smallest) == options.min_held_out:
        return HeldOut("documents", options.min_held_out / documents, int(smallest[-1]) + 1)
    return HeldOut("samples")


def held_out_samples(num_samples: int, options: PackOptions) -> int:
    """Return how many of a domain's samples are held out where its documents are too few.

    >>> held_out_samples(1000, PackOptions(512, held_out=0.01)), held_out_samples(5, PackOptions(512))
    (10, 1)
    """
    wanted = max(round(options.held_out * num_samples), min(options.min_held_out, int(num_samples * _LARGEST_FLOOR)), 1)
    return min(wanted, max(num_samples - 1, 0))


# --- counting ------------------------------------------------------------------------------------------------------


class _DomainSums:
    """Totals of a domain over all units, and what the choice of held-out documents needs."""

    def __init__(self, options: PackOptions) -> None:
        self.documents = self.text_bytes = self.below = 0
        self.smallest: NDArray[np.uint64] = np.empty(0, np.uint64)
        self._options = options

    def add(self, documents: NDArray[Any]) -> None:
        self.documents += len(documents)
        self.text_bytes += int(documents["bytes"].sum())
        self.below += int((documents["hash"] < np.uint64(int(self._options.held_out * HASHES))).sum())
        both = np.union1d(self.smallest, documents["hash"].astype(np.uint64))
        self.smallest = both[: self._options.min_held_out]

    def held_out(self) -> HeldOut:
        """Return how a domain with these totals is split."""
        return choose_held_out(self.documents, self.below, self.smallest.tolist(), self._options)


def _by_domain(table: UnitTable) -> Iterator[tuple[str, NDArray[Any]]]:
    for number, name in enumerate(table.names):
        yield name, table.documents[table.domains == number]


def plan_splits(
    stage: str,
    units: Sequence[int],
    options: PackOptions,
    *,
    scratch: Path,
    keep: str | None = None,
    fixed: Mapping[str, HeldOut] | None = None,
) -> list[DomainPlan]:
    """Return the split plans of every domain, sorted by name.

    Args:
        fixed: how domains that are extended were split; where that was not by documents, all new ones are for training.
        scratch: folder for shuffled orders and best-fit layouts.
        keep: folder of the deduplication's files, or None.
    """
    sums: dict[str, _DomainSums] = {}
    for part in parts_of(stage, units):
        for name, documents in _by_domain(load_kept(stage, part, keep)):
            sums.setdefault(name, _DomainSums(options)).add(documents)
    held_out = {name: (fixed or {}).get(name) or total.held_out() for name, total in sums.items()}
    planner = _Planner(options, scratch, _both_sides(stage, units, keep, held_out), sums)
    names = sorted({name.removesuffix(GIVEN) for name in sums})
    return [planner.domain(name, held_out.get(name), name in (fixed or {})) for name in names]


def _both_sides(
    stage: str, units: Sequence[int], keep: str | None, held_out: Mapping[str, HeldOut]
) -> dict[tuple[str, str], tuple[Stream, int]]:
    """Return, by domain and side of its threshold, the stream and how many documents it has. Reads each part once."""
    tokens: dict[tuple[str, str], list[tuple[Part, int]]] = {(name, side): [] for name in held_out for side in _SIDES}
    counts: Counter[tuple[str, str]] = Counter()
    for part in parts_of(stage, units):
        for name, documents in _by_domain(load_kept(stage, part, keep)):
            below = documents["hash"] < np.uint64(min(held_out[name].threshold, HASHES - 1))
            for side, mask in (("all", slice(None)), ("above", ~below), ("below", below)):
                chosen = documents["tokens"][mask]
                if len(chosen):
                    tokens[name, side].append((part, int(chosen.sum())))
                    counts[name, side] += len(chosen)
    return {
        (name, side): (Stream(stage, name, side, held_out[name].threshold, keep, tuple(rows)), counts[name, side])
        for (name, side), rows in tokens.items()
    }


class _Planner:
    """Turns one domain's streams after another into splits."""

    def __init__(
        self,
        options: PackOptions,
        scratch: Path,
        streams: Mapping[tuple[str, str], tuple[Stream, int]],
        sums: Mapping[str, _DomainSums],
    ) -> None:
        self._options, self._scratch, self._streams, self._sums = options, scratch, streams, sums
        self._files = 0

    def domain(self, name: str, held_out: HeldOut | None, is_fixed: bool) -> DomainPlan:
        options = self._options
        if held_out is None or name + GIVEN in self._sums:
            return self._given(name)
        sums = self._sums[name]
        if is_fixed:
            splits = self._by_documents(name) if held_out.by == "documents" else self._all(name)
            return DomainPlan(name, held_out, splits, sums.documents, sums.text_bytes, "")
        splits = ()
        if held_out.by == "documents":
            splits = self._by_documents(name)
            if not all(split.num_samples for split in splits):
                held_out = HeldOut("samples")
        if held_out.by == "samples":
            splits = self._last_samples(name)
            kept = sum(split.num_samples for split in splits)
            held_out = HeldOut("samples", splits[1].num_samples / kept if kept else 0.0)
        elif held_out.by == "nothing":
            splits = self._all(name)
        problem = _problem(name, splits, sums.documents, options)
        return DomainPlan(name, held_out, splits, sums.documents, sums.text_bytes, problem)

    def _given(self, name: str) -> DomainPlan:
        """Keep the split that the input had."""
        splits = []
        for split, part in (("train", name), ("validation", name + GIVEN)):
            if part not in self._sums:
                splits.append(SplitPlan(split, Stream("", part), 0, 0, 0, 0, 0, 0))
            else:
                splits.append(self._whole(split, part, "all"))
        sums = [self._sums[part] for part in (name, name + GIVEN) if part in self._sums]
        documents, text_bytes = sum(each.documents for each in sums), sum(each.text_bytes for each in sums)
        held_out = HeldOut("given", splits[1].num_documents / documents)
        problem = _problem(name, splits, documents, self._options)
        return DomainPlan(name, held_out, tuple(splits), documents, text_bytes, problem)

    def _by_documents(self, name: str) -> tuple[SplitPlan, ...]:
        return self._whole("train", name, "above"), self._whole("validation", name, "below")

    def _all(self, name: str) -> tuple[SplitPlan, ...]:
        return (self._whole("train", name, "all"),)

    def _whole(self, split: str, name: str, side: str) -> SplitPlan:
        stream, documents = self._ordered(name, side)
        samples, dropped, padding, layout = self._cut(stream)
        return SplitPlan(split, stream, 0, samples, documents, stream.num_tokens, dropped, padding, layout)

    def _ordered(self, name: str, side: str) -> tuple[Stream | Shuffled, int]:
        """Return a stream, shuffled if that is wanted, and how many documents it has."""
        stream, documents = self._streams[name, side]
        seed = self._options.shuffle_seed
        return stream if seed is None else shuffled(stream, seed, self._new_file()), documents

    def _new_file(self) -> Path:
        self._files += 1
        return self._scratch / f"{self._files:06d}"

    def _cut(self, stream: Stream | Shuffled) -> tuple[int, int, int, str | None]:
        """Return samples, dropped tokens, padding, and the layout's file."""
        seq_len, tokens = self._options.seq_len, stream.num_tokens
        if self._options.packing == "none":
            return sum(int(samples_of(part, seq_len).sum()) for part in stream.document_lengths()), 0, 0, None
        if self._options.packing == "best_fit":
            path = self._new_file()
            samples = lay_out(stream.document_lengths(), seq_len, path)
            return samples, 0, samples * seq_len - tokens, str(path)
        samples, rest = divmod(tokens, seq_len)
        if rest and self._options.tail == "pad":
            return samples + 1, 0, seq_len - rest, None
        return samples, rest, 0, None

    def _last_samples(self, name: str) -> tuple[SplitPlan, SplitPlan]:
        """Hold the last samples out: one run of samples shares at most one document with training."""
        stream, documents = self._ordered(name, "all")
        samples, dropped, padding, path = self._cut(stream)
        cut = samples - held_out_samples(samples, self._options)
        if path is None:
            tokens = self._start_of_sample(stream, cut)
            before = _documents_before(stream, tokens)
        else:
            layout = load_layout(path, 0, cut)
            tokens, before = int(layout.length.sum()), int(layout.is_document.sum())
        train_padding = 0 if self._options.packing == "none" else cut * self._options.seq_len - tokens
        train = SplitPlan("train", stream, 0, cut, before, tokens, 0, train_padding, path)
        rest = (documents - before, stream.num_tokens - tokens, dropped, padding - train_padding)
        first_token = 0 if path else tokens
        return train, SplitPlan("validation", stream, cut, samples - cut, *rest, path, first_token)

    def _start_of_sample(self, stream: Stream | Shuffled, sample: int) -> int:
        """Return the first token of a sample of a stream that is not laid out."""
        seq_len = self._options.seq_len
        if self._options.packing != "none":
            return min(sample * seq_len, stream.num_tokens)
        at = number = 0
        for lengths in stream.document_lengths():
            counts = samples_of(lengths, seq_len)
            if number + counts.sum() > sample:
                document = int(np.searchsorted(np.cumsum(counts), sample - number, "right"))
                number += int(counts[:document].sum())
                return at + int(lengths[:document].sum()) + (sample - number) * seq_len
            number += int(counts.sum())
            at += int(lengths.sum())
        return at


def samples_of(lengths: NDArray[np.int64], seq_len: int) -> NDArray[np.int64]:
    """Return how many samples documents of these lengths make if each begins a new one.

    >>> samples_of(np.array([1, 4, 5]), 4).tolist()
    [1, 1, 2]
    """
    return -(-lengths // seq_len)


def _documents_before(stream: Stream | Shuffled, token: int) -> int:
    """Return how many documents start before a token of the stream."""
    count = at = 0
    for lengths in stream.document_lengths():
        if at >= token:
            break
        count += int((at + np.cumsum(lengths) - lengths < token).sum())
        at += int(lengths.sum())
    return count


def _problem(name: str, splits: Sequence[SplitPlan], documents: int, options: PackOptions) -> str:
    empty = [split.split for split in splits if split.num_samples == 0]
    if not empty:
        return ""
    tokens = sum(split.tokens_in for split in splits)
    return (
        f"domain {name!r} has no {' and no '.join(empty)} sample: its {documents:,} documents hold"
        f" {tokens:,} tokens, and a sample takes {options.seq_len:,}"
        f" ({'two samples are' if options.held_out else 'one is'} needed). Lower --seq-len, add text, leave the domain"
        " out with --exclude or --domain-map, or accept it with --allow-empty."
    )


def require_samples(plans: Sequence[DomainPlan], options: PackOptions) -> list[str]:
    """Return the problems as warnings if they are allowed, else raise the first of them."""
    problems = [plan.problem for plan in plans if plan.problem]
    if problems and not options.allow_empty:
        raise InputError(problems[0] + (f" ({len(problems) - 1} more domains like this.)" if len(problems) > 1 else ""))
    return problems


_HELD_AT_ONCE = 1 << 22  # hashes of held-out documents in memory


def copies_across_splits(plans: Sequence[DomainPlan]) -> int:
    """Return how many training documents have the very text of a document that is held out, in any domain.

    Reads all tables of documents once for every ``_HELD_AT_ONCE`` that are held out, so that memory is bounded.
    """
    splits = [split for plan in plans for split in plan.splits if split.num_documents]
    held_out = [split for split in splits if split.split == "validation"]
    passes = -(-sum(split.num_documents for split in held_out) // _HELD_AT_ONCE)
    trained = [split for split in splits if split.split == "train"]
    return sum(_copies(held_out, trained, number, passes) for number in range(passes))


def _copies(held_out: Sequence[SplitPlan], trained: Sequence[SplitPlan], number: int, passes: int) -> int:
    """Count those copies whose hash leaves the rest ``number``."""

    def chosen(splits: Sequence[SplitPlan]) -> Iterator[NDArray[np.uint64]]:
        for hashes in (hashes for split in splits for hashes in _hashes(split)):
            yield hashes[hashes % np.uint64(passes) == number] if passes > 1 else hashes

    known = np.unique(np.concatenate([np.empty(0, np.uint64), *chosen(held_out)]))
    if not len(known):
        return 0
    return sum(
        int((known[known.searchsorted(each).clip(max=len(known) - 1)] == each).sum()) for each in chosen(trained)
    )


def _hashes(split: SplitPlan) -> Iterator[NDArray[np.uint64]]:
    """Yield the text hashes of the documents that start in a split."""
    stream = split.stream
    if stream.side != "all":
        yield from (table["hash"].astype(np.uint64) for table in stream.documents())
    elif split.layout is None:  # split by samples: the documents follow one another
        total = sum(len(table) for table in stream.documents())
        first = 0 if split.first_sample == 0 else total - split.num_documents
        at = 0
        for table in stream.documents():
            yield table["hash"][max(first - at, 0) : max(first + split.num_documents - at, 0)].astype(np.uint64)
            at += len(table)
    else:  # of few documents, or they would be split by documents
        tables = np.concatenate([np.empty(0, DOCUMENT), *stream.documents()])
        layout = load_layout(split.layout, split.first_sample, split.first_sample + split.num_samples)
        lengths = tables["tokens"].astype(np.int64)
        place = np.searchsorted(np.cumsum(lengths) - lengths, layout.start[layout.is_document])
        yield tables["hash"][place].astype(np.uint64)
