"""What is refused before training, because it could only fail later or go wrong without a word."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from composer.core import Precision, State
from composer.utils import dist
from numpy.typing import NDArray
from torch import nn

from algorithms.heldout import HeldOutWindows
from algorithms.loader_facts import rounded
from algorithms.references import BigramLosses, CachedLosses, FrozenModel, Reference
from algorithms.references.frozen import fingerprint_of
from algorithms.rules.base import UpdateRule
from algorithms.sharding import is_flattened
from algorithms.signals import Signals
from mixer.errors import InputError

__all__ = [
    "check_auto_micro_batches",
    "check_not_its_own_reference",
    "check_numbers",
    "check_parallelism",
    "check_rule",
    "check_same_domains",
    "check_same_on_ranks",
    "check_same_weights",
    "check_settings",
    "warn_of_its_own_reference",
]

log = logging.getLogger(__name__)

ALIKE = 2e-3  # nats; bfloat16 moves the mean loss of a sample by less


def check_rule(rule: Any) -> None:
    """Raise InputError unless this is a rule, or None."""
    if rule is not None and not isinstance(rule, UpdateRule):
        raise InputError(f"a rule is what a method returns when it is called, such as doremi(); got {rule!r}.")


def check_numbers(on_nonfinite: str, min_tokens: int, gradients_of: Any) -> None:
    """Raise InputError for settings out of their range, which would show only later."""
    if on_nonfinite not in ("fail", "skip"):
        raise InputError(f'on_nonfinite must be "fail" or "skip"; got {on_nonfinite!r}.')
    if not isinstance(min_tokens, int) or min_tokens < 0:
        raise InputError(f"min_tokens must be a whole number >= 0; got {min_tokens!r}.")
    if gradients_of != "all" and not callable(gradients_of):
        raise InputError(
            f'gradients are measured of "all" parameters or of those a function accepts; got {gradients_of!r}.'
        )


def check_settings(
    rule: UpdateRule | None,
    target: str,
    normalization: str,
    reference: Reference | None,
    heldout: HeldOutWindows | None,
    gathered: frozenset[str],
) -> None:
    """Raise InputError where the settings of ``DomainReweighting`` do not fit each other."""
    if target not in ("loss", "sampling"):
        raise InputError(f'apply must be "loss" or "sampling"; got {target!r}.')
    if normalization not in ("domain", "tokens"):
        raise InputError(f'normalization must be "domain" or "tokens"; got {normalization!r}.')
    if rule is None:
        return
    if "reference" in rule.needs and reference is None:
        raise InputError(
            f"the rule {rule.name!r} compares with a reference, and none was given: "
            f"DomainReweighting({rule.name}(), reference=...) takes a model, its path, or cached losses."
        )
    if rule.settings.get("clip") == "token" and reference is not None and not reference.per_token:
        raise InputError(
            f"{rule.name}(clip='token') clips the excess of single tokens; this reference knows only sums. "
            "Use clip='domain' or clip='none', or a reference with a loss per token."
        )
    if "heldout" in rule.needs and heldout is None:
        raise InputError(
            f"the rule {rule.name!r} reads held-out losses, and there are no windows: "
            'give heldout="shards", the folder of shards with a validation split.'
        )
    if "heldout_reference" in rule.needs and reference is not None and not reference.for_any_batch:
        raise InputError(
            f"the rule {rule.name!r} compares losses on held-out windows, which this reference does not know: its "
            "losses are of training samples. Give a model or target losses, or no reference, for the model's own "
            "first losses."
        )
    if isinstance(reference, BigramLosses) and rule.settings.get("clip") in ("token", "domain", "confident"):
        log.warning(
            "%s(clip=%r) counts losses below the reference as 0, and a trained model is well below bigram tables: use "
            "clip='none', or dro_lm.",
            rule.name,
            rule.settings["clip"],
        )
    if rule.needs - gathered:
        raise InputError(
            f"the rule {rule.name!r} needs {sorted(rule.needs - gathered)}, which DomainReweighting does not gather. "
            "Use it in a loop of your own."
        )


def check_same_domains(ours: Sequence[str], theirs: Sequence[str]) -> None:
    """Raise InputError where the loader of another ``fit`` has other domains, or the same in another order."""
    if tuple(ours) != tuple(theirs):
        raise InputError(
            f"the run was begun on the domains {list(ours)}, this loader's are {list(theirs)}: its domain_ids would "
            "be taken for those. Make a new DomainReweighting, or a loader of the same domains."
        )


def check_same_weights(
    domains: Sequence[str], rule: str, drawn: NDArray[np.float64] | None, first: NDArray[np.float64] | None
) -> None:
    """Raise InputError where the loader draws by other weights than the rule starts from; None says nothing."""
    if drawn is None or first is None or np.allclose(drawn, first, rtol=1e-6, atol=1e-9):
        return
    raise InputError(
        f"the loader draws by {rounded(domains, drawn)}, the rule {rule!r} starts from {rounded(domains, first)}, and "
        "one of the two would be ignored. Give the loader the rule's as mixture, or by set_weights."
    )


def check_same_on_ranks(mine: Mapping[str, Any]) -> None:
    """Raise InputError where ranks were given different settings: sums of different things would be added."""
    for number, other in enumerate(dist.all_gather_object(dict(mine))):
        for name, value in mine.items():
            if other[name] != value:
                raise InputError(
                    f"rank {number} has {name} {other[name]!r}, rank {dist.get_global_rank()} has {value!r}. All ranks "
                    "need the same."
                )


def check_not_its_own_reference(rule: UpdateRule | None, reference: Reference | None, proxy: nn.Module | None) -> None:
    """Raise InputError where a clipped excess loss is 0 at the start and can hardly ever be more.

    Args:
        proxy: None where its parameters are spread over ranks, and nothing is checked.
    """
    if not _clips(rule) or not isinstance(reference, FrozenModel | CachedLosses) or proxy is None:
        return
    if fingerprint_of(proxy) == reference.fingerprint:
        raise InputError(f"the proxy starts as its own reference: {_STARVES}")


def warn_of_its_own_reference(rule: UpdateRule | None, signals: Signals) -> None:
    """Log a warning where the losses of the first step say that the proxy is its own reference.

    The same weights in another precision, or in parts on many ranks, have another digest or none. Their mean losses
    over a sample agree to rounding; those of two models do not.
    """
    if not _clips(rule) or signals.excess_squared is None or signals.num_sequences is None:
        return
    if not signals.num_sequences.any():
        return
    apart = float(np.sqrt(signals.excess_squared.sum() / signals.num_sequences.sum()))
    if apart < ALIKE:
        log.warning(
            "the losses of proxy and reference are %.1g nats apart, as if they were one model: %s", apart, _STARVES
        )


def _clips(rule: UpdateRule | None) -> bool:
    return rule is not None and rule.name == "doremi" and rule.settings["clip"] != "none"


_STARVES = (
    "no excess loss is above 0, and what is new to the model would be starved. Start the proxy from other weights, or "
    "use modified_doremi or validation_feedback with a target for each new domain."
)


def check_parallelism(state: State, needs: frozenset[str] = frozenset()) -> None:
    """Raise InputError where ranks share samples, or a rule needs gradients that the run does not give.

    Args:
        needs: signals that a rule reads.
    """
    shared = getattr(state.train_dataloader, "seq_parallel_world_size", 1)
    if state.tp_config is not None or shared > 1:
        how = "tensor parallelism" if state.tp_config is not None else "sequence parallelism"
        raise InputError(
            f"under {how} several ranks work on the same samples, which the sums over ranks would count several times. "
            "Use FSDP2 (parallelism_config=ParallelismConfig(fsdp2=FSDP2Config())) or DDP."
        )
    wanted = sorted(needs & {"gradients", "gradient_variance"})
    if wanted and is_flattened(state.model):
        raise InputError(
            f"{wanted} of single domains cannot be measured under FSDP1, whose parameters are flattened together. Use "
            "FSDP2 (parallelism_config=ParallelismConfig(fsdp2=FSDP2Config())) or DDP."
        )
    if wanted and state.precision == Precision.AMP_FP16:
        raise InputError(
            f"{wanted} of single domains are too small for float16, whose scaling belongs to the loss alone. Use "
            "precision='amp_bf16' or 'fp32'."
        )


def check_auto_micro_batches(state: State, reference: Reference | None, on_nonfinite: str) -> None:
    """Raise InputError where ranks would wait for one that ran out of memory.

    ``device_train_microbatch_size="auto"`` lets a rank leave a micro-batch; what it should have sent to the others then
    never comes.
    """
    if not state.auto_microbatching or dist.get_world_size() == 1:
        return
    if isinstance(reference, FrozenModel) and reference.sharded:
        raise InputError(
            "a sharded reference and device_train_microbatch_size='auto' do not go together: ranks would wait for ever "
            "for the parts of one that ran out of memory. Give a number, or leave the reference whole."
        )
    if on_nonfinite == "skip" and state.fsdp_enabled:
        raise InputError(
            "on_nonfinite='skip' under FSDP and device_train_microbatch_size='auto' do not go together: ranks would "
            "wait for ever for the word of one that ran out of memory. Give a number, or use on_nonfinite='fail'."
        )
