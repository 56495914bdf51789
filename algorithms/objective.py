"""What an average over domains weighs them by: alike, by size, or as a file says.

    objective_weights("uniform", sizes)         # {"code": 0.5, "web": 0.5}
    objective_weights("goals.json", sizes)      # a mixture file, {"weights": {"code": 3, "web": 1}}

Lower losses on average do not mean better results in use; whoever knows which domains matter says so here. Mixtures say
what is trained on, objectives what for.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from mixer.errors import InputError
from mixer.mixture import Mixture

__all__ = ["objective_weights", "weighted_average"]


def objective_weights(source: str | os.PathLike[str], sizes: Mapping[str, float]) -> dict[str, float]:
    """Return a weight for each name of ``sizes``, summing to 1.

    Args:
        source: "uniform", "proportional" (to the sizes), or the path of a file like a mixture's.

    Raises: InputError: if the file names others, leaves one out, or is no such file.

    >>> objective_weights("proportional", {"code": 1, "web": 3})
    {'code': 0.25, 'web': 0.75}
    """
    if source == "uniform":
        return dict(Mixture(dict.fromkeys(sizes, 1.0)).weights)
    if source == "proportional":
        return dict(Mixture(sizes).weights)
    weights = dict(Mixture.load(source).weights)
    unknown, missing = sorted(set(weights) - set(sizes)), sorted(set(sizes) - set(weights))
    if unknown or missing:
        raise InputError(
            f"the objective {source} must weigh {sorted(sizes)}: it has others {unknown} and lacks {missing}. Give "
            "0 to what does not matter."
        )
    return weights


def weighted_average(losses: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """Return the average of losses by name; ``weights`` sum to 1.

    >>> weighted_average({"code": 1.0, "web": 2.0}, {"code": 0.25, "web": 0.75})
    1.75
    """
    return float(sum(weight * losses[name] for name, weight in weights.items()))
