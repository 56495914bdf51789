"""What a training loader says of itself: its domains, the weights it draws by, where its samples come from.

``MixtureLoader`` says all of it; another loader may say less, and then the caller has to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from algorithms.rules.base import Domains, as_domains
from mixer.errors import InputError
from mixer.manifest import Manifest

__all__ = ["domains_of", "planned_samples", "rounded", "sampling_weights", "shards_provenance"]


def domains_of(given: Domains | Sequence[str] | None, loader: Any) -> Domains:
    """Return the domains of a run: those given, or the loader's with its sizes and the weights it draws by as prior.

    Raises: InputError: if neither says what they are, or the two differ.
    """
    names = None if getattr(loader, "domains", None) is None else tuple(loader.domains)
    if given is not None:
        domains = as_domains(given)
        if names not in (None, domains.names):
            raise InputError(
                f"the domains given are {list(domains.names)}, the loader's are {list(names or ())}; domain_ids index "
                "the loader's. Leave the argument out."
            )
        return domains
    if names is None:
        raise InputError(
            f"{type(loader).__name__} does not say what its domains are: "
            "give DomainReweighting(..., domains=[names in the order of domain_ids])."
        )
    manifest, shares = getattr(loader, "manifest", None), sampling_weights(loader)
    sizes = None if manifest is None else [_num_tokens(manifest, name) for name in names]
    return as_domains(names, sizes, None if shares is None else shares.tolist())


def _num_tokens(manifest: Manifest, name: str) -> int:
    split = manifest.domains[name].splits.get("train")
    return 0 if split is None else split.num_tokens


def sampling_weights(loader: Any) -> NDArray[np.float64] | None:
    """Return the weights (D,) that decide the loader's next batch; None if it does not say."""
    names, weights = getattr(loader, "domains", None), getattr(loader, "weights", None)
    if names is None or weights is None:
        return None
    return np.array([weights[name] for name in names] if isinstance(weights, Mapping) else weights, dtype=np.float64)


def planned_samples(loader: Any, batch: Mapping[str, Any]) -> NDArray[np.int64] | None:
    """Return the samples (D,) of each domain in the global batch where the loader knows and every token counts.

    Then no rank has to ask the others. None where the batch says itself which tokens count, or is not as delivered.
    """
    if not hasattr(loader, "counts_of") or "labels" in batch or "attention_mask" in batch:
        return None
    return loader.counts_of(batch)


def rounded(domains: Sequence[str], weights: NDArray[np.float64]) -> dict[str, float]:
    """Return weights by name, short enough for a message."""
    return {name: round(float(weight), 6) for name, weight in zip(domains, weights)}


def shards_provenance(loader: Any) -> dict[str, Any]:
    """Return the fingerprints of the loader's tokenizer and training shards, as ``Mixture.check`` reads them."""
    manifest = getattr(loader, "manifest", None)
    if manifest is None:
        return {}
    splits = {name: manifest.domains[name].splits.get("train") for name in manifest.names}
    shards = {name: split.fingerprint for name, split in splits.items() if split is not None}
    return {"tokenizer": manifest.tokenizer.fingerprint, "shards": shards}
