"""From what a person gives (a mixture in any form, shards) to a mixer; needs no torch and reads no shard."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mixer.curriculum import CurriculumStage, load_curriculum
from mixer.errors import InputError
from mixer.manifest import Manifest
from mixer.mixer import Mixer
from mixer.mixture import Mixture
from mixer.static_weights import proportional, uniform

__all__ = ["MixtureLike", "mixer_for", "resolve_curriculum", "resolve_mixture", "tokens_in"]

MixtureLike = str | os.PathLike[str] | Mapping[str, float] | Mixture


def mixer_for(manifest: Manifest, stages: Sequence[CurriculumStage], *, split: str = "train", **options: Any) -> Mixer:
    """Return a mixer over the domains of a manifest, with later stages scheduled. ``options`` are the mixer's."""
    splits = {name: domain.splits.get(split) for name, domain in manifest.domains.items()}
    mixer = Mixer(
        {name: 0 if entry is None else entry.num_samples for name, entry in splits.items()},
        fingerprints={name: "" if entry is None else entry.fingerprint for name, entry in splits.items()},
        weights=stages[0].mixture.weights,
        mean_tokens=_mean_tokens(manifest, split) if manifest.variable_length else None,
        **options,
    )
    for stage in stages[1:]:
        if stage.in_tokens and manifest.variable_length:
            mixer.schedule_at_tokens(stage.start, stage.mixture.weights, ramp=stage.ramp)
        elif stage.in_tokens:
            samples, ramp = -(-stage.start // manifest.seq_len), stage.ramp // manifest.seq_len
            mixer.schedule_at(samples, stage.mixture.weights, ramp=ramp)
        else:
            mixer.schedule(stage.start, stage.mixture.weights, ramp=stage.ramp)
    return mixer


def tokens_in(manifest: Manifest, domain: str, split: str) -> int:
    """Return the tokens of a domain's split, 0 where it has none."""
    entry = manifest.domains[domain].splits.get(split)
    if entry is None:
        return 0
    return entry.num_tokens if manifest.variable_length else entry.num_samples * manifest.seq_len


def _mean_tokens(manifest: Manifest, split: str) -> dict[str, float]:
    splits = {name: domain.splits.get(split) for name, domain in manifest.domains.items()}
    return {
        name: entry.num_tokens / entry.num_samples if entry is not None and entry.num_samples else 1.0
        for name, entry in splits.items()
    }


def resolve_mixture(
    mixture: MixtureLike,
    manifest: Manifest,
    *,
    split: str = "train",
    force: bool = False,
) -> Mixture:
    """Return a checked mixture for these shards from any form that a loader accepts; of stages, the first.

    Raises: InputError: if it does not fit the shards, or gives a weight to a domain without samples in the split.
    """
    return resolve_curriculum(mixture, manifest, split=split, force=force)[0].mixture


def resolve_curriculum(
    mixture: MixtureLike,
    manifest: Manifest,
    *,
    split: str = "train",
    force: bool = False,
) -> list[CurriculumStage]:
    """Return the checked stages of a mixture: one, unless it is a file with several."""
    num_samples = {
        name: domain.splits[split].num_samples if split in domain.splits else 0
        for name, domain in manifest.domains.items()
    }
    sizes = np.array([num_samples[name] for name in manifest.names], np.float64)
    if not sizes.any():
        raise InputError(
            f"no domain has a sample in split {split!r}. Convert with a held-out share, or use another split."
        )
    if isinstance(mixture, str) and mixture in ("proportional", "uniform"):
        if manifest.variable_length:  # weights are shares of tokens
            sizes = np.array([tokens_in(manifest, name, split) for name in manifest.names], np.float64)
        values = proportional(sizes) if mixture == "proportional" else uniform(len(sizes))
        found = Mixture(dict(zip(manifest.names, values.tolist())), {"rule": mixture})
    elif isinstance(mixture, Mixture | Mapping):
        found = mixture if isinstance(mixture, Mixture) else Mixture(mixture)
    else:
        stages = load_curriculum(mixture)
        return [
            stage._replace(mixture=_fitting(stage.mixture, manifest, num_samples, split, force)) for stage in stages
        ]
    return [CurriculumStage(_fitting(found, manifest, num_samples, split, force), 0, 0, False)]


def _fitting(mixture: Mixture, manifest: Manifest, num_samples: Mapping[str, int], split: str, force: bool) -> Mixture:
    found = mixture.check(manifest, force=force)
    empty = [name for name, weight in found.weights.items() if weight > 0 and not num_samples[name]]
    if empty:
        raise InputError(
            f"domains without a sample in split {split!r} cannot have a weight: {empty[:8]}. Give them weight 0, or"
            " convert them with a held-out share."
        )
    return found
