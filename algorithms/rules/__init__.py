"""Every update rule by name: a new one is a file and a row here; the row enters it into the shared tests."""

from __future__ import annotations

from collections.abc import Callable

from algorithms.rules.ado import ado
from algorithms.rules.agnostic import agnostic
from algorithms.rules.aioli import aioli
from algorithms.rules.base import Domains, UpdateRule, as_domains, state_from_dict, state_to_dict
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

__all__ = ["Domains", "UPDATE_RULES", "UpdateRule", "as_domains", "state_from_dict", "state_to_dict"]

UPDATE_RULES: dict[str, Callable[..., UpdateRule]] = {
    "erm": erm,
    "uniform": uniform,
    "temperature": temperature,
    "unimax": unimax,
    "preset": preset,
    "given": given,
    "doremi": doremi,
    "modified_doremi": modified_doremi,
    "hardest": hardest,
    "easiest": easiest,
    "group_dro": group_dro,
    "agnostic": agnostic,
    "mero": mero,
    "lookahead": lookahead,
    "dro_lm": dro_lm,
    "topic_cvar": topic_cvar,
    "divergence_ball": divergence_ball,
    "wasserstein": wasserstein,
    "on_demand": on_demand,
    "validation_feedback": validation_feedback,
    "sheared_llama": sheared_llama,
    "jtt": jtt,
    "odm": odm,
    "skill_it": skill_it,
    "aioli": aioli,
    "doge": doge,
    "pike": pike,
    "ado": ado,
}
