"""Every update rule: how it is made, and one line each about what it optimises, what it costs and where it comes from.

A new rule is a file and a row here; the row enters it into ``UPDATE_RULES``, ``mixer methods`` and the shared tests.
What it needs and what its weights act on are not repeated here: they are read from the rule.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from algorithms.rules.ado import ado
from algorithms.rules.agnostic import agnostic
from algorithms.rules.aioli import aioli
from algorithms.rules.base import UpdateRule
from algorithms.rules.best_response import divergence_ball, dro_lm, topic_cvar, wasserstein
from algorithms.rules.doremi import doremi, easiest, hardest
from algorithms.rules.feedback import sheared_llama, validation_feedback
from algorithms.rules.fixed import erm, given, preset, temperature, uniform, unimax
from algorithms.rules.gradients import doge, pike
from algorithms.rules.group_dro import group_dro
from algorithms.rules.jtt import jtt
from algorithms.rules.lookahead import lookahead
from algorithms.rules.mero import mero
from algorithms.rules.modified_doremi import modified_doremi
from algorithms.rules.odm import odm
from algorithms.rules.on_demand import on_demand
from algorithms.rules.skill_it import skill_it

__all__ = ["CATALOGUE", "COSTS", "Entry"]


class Entry(NamedTuple):
    """What makes the rule; and a line each: what is optimised, the extra cost (a row of ``COSTS``), the source."""

    make: Callable[..., UpdateRule]
    optimises: str
    cost: str
    paper: str


_NONE = "none"
_HELDOUT = "D evaluations"
_REFERENCE = "reference pass"
_GRADIENTS = "D backward passes"

# What the words for costs mean, for one update.
COSTS = {
    _NONE: "nothing measurable",
    _REFERENCE: "the reference's forward pass, about 1/3 of a step; nothing if its losses are cached",
    _HELDOUT: "a forward pass over a few held-out samples of each of the D domains",
    _GRADIENTS: "a forward and backward pass per domain",
    "probes": "D evaluations, and training on probe mixtures meanwhile",
    "table look-up": "a table look-up per token",
    "curve fits": "a fit of D scaling curves now and then",
    "a first run": "a whole run before the one that counts",
}

CATALOGUE: dict[str, Entry] = {
    "erm": Entry(erm, "the average over all samples", _NONE, "baseline"),
    "uniform": Entry(uniform, "the average over domains", _NONE, "baseline"),
    "temperature": Entry(
        temperature, "between proportional and uniform", _NONE, "Arivazhagan et al. 2019, arXiv:1907.05019"
    ),
    "unimax": Entry(
        unimax, "the average over domains, none read too often", _NONE, "Chung et al. 2023, arXiv:2304.09151"
    ),
    "preset": Entry(preset, "a published table", _NONE, "mostly Xie et al. 2023, arXiv:2305.10429"),
    "given": Entry(given, "your own numbers", _NONE, "baseline"),
    "doremi": Entry(
        doremi,
        "worst excess loss over a reference; result: average weights",
        _REFERENCE,
        "Xie et al. 2023, arXiv:2305.10429",
    ),
    "modified_doremi": Entry(
        modified_doremi,
        "forgetting on old domains, excess over a target on new ones",
        _REFERENCE,
        "after arXiv:2305.10429; no paper",
    ),
    "hardest": Entry(hardest, "ablation: highest loss", _NONE, "Xie et al. 2023, arXiv:2305.10429, Table 7"),
    "easiest": Entry(
        easiest, "ablation: lowest reference loss", _REFERENCE, "Xie et al. 2023, arXiv:2305.10429, Table 7"
    ),
    "group_dro": Entry(
        group_dro, "worst mixture of domains, by exponentiated gradient", _NONE, "Sagawa et al. 2020, arXiv:1911.08731"
    ),
    "agnostic": Entry(
        agnostic, "worst mixture within a box, by projected gradient", _NONE, "Mohri et al. 2019, arXiv:1902.00146"
    ),
    "mero": Entry(
        mero,
        "worst loss above each domain's lowest attainable",
        _REFERENCE,
        "Zhang and Tu 2023, arXiv:2306.00026",
    ),
    "lookahead": Entry(
        lookahead,
        "worst loss after the next step, weights spread widely",
        _GRADIENTS,
        "reconstruction of Michel et al. 2021, arXiv:2110.05838",
    ),
    "dro_lm": Entry(
        dro_lm,
        "worst share alpha of domains, above a bigram baseline",
        "table look-up",
        "Oren et al. 2019, arXiv:1909.02060",
    ),
    "topic_cvar": Entry(topic_cvar, "worst share alpha of domains", _NONE, "Oren et al. 2019, arXiv:1909.02060"),
    "divergence_ball": Entry(
        divergence_ball,
        "worst mixture within a KL, chi-square or CVaR ball of the prior",
        _NONE,
        "Zhou et al. 2021, arXiv:2109.04020",
    ),
    "wasserstein": Entry(
        wasserstein,
        "worst mixture within a transport distance of the prior",
        _NONE,
        "our linear programme; set of arXiv:1710.10571",
    ),
    "on_demand": Entry(
        on_demand,
        "worst mixture of domains, sampling by the adversary",
        _HELDOUT,
        "Haghtalab et al. 2022, arXiv:2210.12529",
    ),
    "validation_feedback": Entry(
        validation_feedback,
        "held-out level, excess over targets, or progress",
        _HELDOUT,
        "continual stages; no single paper",
    ),
    "sheared_llama": Entry(
        sheared_llama, "excess of held-out loss over scaling-law targets", _HELDOUT, "Xia et al. 2023, arXiv:2310.06694"
    ),
    "jtt": Entry(
        jtt,
        "a second run that draws badly learnt sequences more often",
        "a first run",
        "Liu et al. 2021, arXiv:2107.09044",
    ),
    "odm": Entry(odm, "a bandit on training loss", _NONE, "Albalak et al. 2023, arXiv:2312.02406"),
    "skill_it": Entry(
        skill_it,
        "held-out losses spread along a graph of what helps what",
        _HELDOUT,
        "Chen et al. 2023, arXiv:2307.14430",
    ),
    "aioli": Entry(
        aioli,
        "average loss, by a measured linear mixing law",
        "probes",
        "Chen et al. 2024, arXiv:2411.05735",
    ),
    "doge": Entry(
        doge,
        "alignment with the targets' gradients; result: average weights",
        _GRADIENTS,
        "Fan et al. 2023, arXiv:2310.15393",
    ),
    "pike": Entry(pike, "average loss, by gradient norm against noise", _GRADIENTS, "Li et al. 2025, arXiv:2502.06244"),
    "ado": Entry(
        ado,
        "fastest fall of the fitted scaling curves",
        "curve fits",
        "Jiang et al. 2024, arXiv:2410.11820",
    ),
}
