"""A mixture: how much of each domain to train on, and how those weights came about.

    mixture = Mixture({"code": 0.3, "web": 0.7})
    mixture.save("mixture.json");  Mixture.load("mixture.json").weights["web"]  # 0.7

Weights are shares of samples, non-negative, normalised to sum to 1 when the mixture is made. ``provenance`` says which
rule, settings, steps, tokenizer, shards and reference produced them: weights found with one tokenizer or one corpus say
little about another (methods differ by more than 0.5 in total variation). ``check`` refuses to use them silently with
another tokenizer or other domains; whether the text of those domains is still alike, it leaves to the user.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixer.errors import DataError, InputError
from mixer.manifest import Manifest

__all__ = ["Mixture", "check_schema"]

SCHEMA = 1


@dataclass(frozen=True)
class Mixture:
    """Domain → weight, with provenance.

    Args:
        weights: non-negative finite numbers by domain name, one positive at least; stored normalised, sorted by name.
        provenance: JSON-like facts. ``check`` compares ``tokenizer`` (fingerprint). ``shards`` (domain → fingerprint
            of its train split) says what the weights were found on; weights may be used on after a corpus has grown.

    >>> Mixture({"web": 3, "code": 1}).weights
    {'code': 0.25, 'web': 0.75}
    """

    weights: Mapping[str, float]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.weights:
            raise InputError("a mixture needs at least one domain; got an empty mapping.")
        bad = {name: weight for name, weight in self.weights.items() if not _is_weight(weight)}
        if bad:
            raise InputError(f"mixture weights must be finite and >= 0; got {bad}.")
        total = math.fsum(self.weights.values())
        if total <= 0:
            raise InputError(f"mixture weights sum to {total}; at least one domain needs a positive weight.")
        # Weights that already sum to 1 within rounding are kept to the bit, so that save and load are exact.
        scale = 1.0 if abs(total - 1.0) <= 1e-12 else total
        object.__setattr__(self, "weights", {name: float(self.weights[name]) / scale for name in sorted(self.weights)})

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the mixture as JSON, atomically, and return the path.

        Raises: DataError: naming the path, if it cannot be written.
        """
        target = Path(path)
        text = json.dumps(
            {"schema": SCHEMA, "weights": dict(self.weights), "provenance": dict(self.provenance)},
            indent=2,
            ensure_ascii=False,
        )
        partial = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(text + "\n", encoding="utf-8")
            os.replace(partial, target)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise DataError(
                f"cannot write the mixture {target}: {error.strerror}. Name a file in a folder that can be written to."
            ) from error
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Mixture:
        """Read a mixture file.

        Raises: InputError: if the file is missing, is not JSON, or is not of this form.
        """
        try:
            raw = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(
                f"cannot read the mixture {path}: {error.strerror}. "
                "`mixer weigh` and `mixer optimize` write such files."
            ) from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path} is not a mixture file: {error}.") from error
        if not isinstance(raw, dict) or not isinstance(raw.get("weights"), dict):
            raise InputError(f'{path} is not a mixture file: expected {{"weights": {{domain: share, …}}}}.')
        check_schema(path, raw)
        provenance = raw.get("provenance", {})
        if not isinstance(provenance, dict):
            raise InputError(
                f"{path} is not a mixture file: its provenance is {provenance!r:.80}, expected an object of facts, such"
                ' as {"note": "by hand"}; it may also be left out.'
            )
        return cls(raw["weights"], provenance)

    def check(self, manifest: Manifest, *, force: bool = False) -> Mixture:
        """Return this mixture if it fits ``manifest``, naming both sides where it does not.

        A domain that the mixture names must exist in the manifest, and the other way round, and the tokenizer of the
        provenance must be the manifest's. With ``force`` domains missing from the mixture get weight 0, unknown ones
        are dropped, other mismatches are ignored, and ``provenance["forced"]`` records every difference.

        Raises: InputError: on a mismatch without ``force``, or if nothing is left after dropping unknown domains.
        """
        differences = []
        unknown = sorted(set(self.weights) - set(manifest.names))
        missing = sorted(set(manifest.names) - set(self.weights))
        if unknown:
            differences.append(f"it names domains without shards: {unknown}")
        if missing:
            differences.append(f"it says nothing of the domains {missing}")
        made_for, theirs = self.provenance.get("tokenizer"), manifest.tokenizer.fingerprint
        if made_for and made_for != theirs:
            differences.append(f"it was made for tokenizer {_brief(made_for)}, the shards for {_brief(theirs)}")
        if not differences:
            return self
        if not force:
            raise InputError(
                f"this mixture does not fit these shards: {'; '.join(differences)}. Find weights for these "
                "shards, change the mixture, or use force (--force) to go on anyway; that is recorded."
            )
        weights = {name: self.weights.get(name, 0.0) for name in manifest.names}
        if not any(weights.values()):
            raise InputError(
                f"nothing of this mixture is left for these shards: it gives weights to {sorted(self.weights)}, the "
                f"shards have {list(manifest.names)}. Use a mixture that names at least one of them."
            )
        return Mixture(weights, {**self.provenance, "forced": differences})


def _brief(fingerprint: object) -> str:
    text = str(fingerprint)
    return text if len(text) <= 20 else f"{text[:20]}…"


def check_schema(path: str | os.PathLike[str], raw: Mapping[str, Any]) -> None:
    """Refuse a mixture file of another version; one written by hand needs to name none."""
    if raw.get("schema", SCHEMA) != SCHEMA:
        raise InputError(
            f"{path} has schema {raw['schema']!r}, this version of domain-mixer reads {SCHEMA}. "
            "Update domain-mixer, or write the file anew."
        )


def _is_weight(weight: object) -> bool:
    return isinstance(weight, int | float) and not isinstance(weight, bool) and math.isfinite(weight) and weight >= 0
