"""``DomainReweighting``: find domain weights while a proxy model trains with Composer.

    algorithm = DomainReweighting(doremi(), reference=reference)
    Trainer(model=HuggingFaceModel(proxy), train_dataloader=loader, algorithms=[algorithm], max_duration="1000ba").fit()
    algorithm.mixture().save("mixture.json")

Per step: tokens per domain are counted over all ranks before the first forward; every micro-batch adds its sums on its
own (no communication, so an out-of-memory retry on one rank can neither hang nor count twice) and gets its part of the
weighted loss; after the optimiser step one all-reduce of a few numbers per domain feeds the update rule, which every
rank computes alike. The weights of step t are those found by step t − 1.

The proxy runs once. A ``HuggingFaceModel`` is called without labels and its loss is taken from the logits here, so the
cross-entropy is computed once, too, for all Hugging Face models and without touching them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from composer.core import Algorithm, Event, Precision, State, get_precision_context
from composer.loggers import Logger
from composer.models import HuggingFaceModel
from composer.utils import dist
from numpy.typing import NDArray
from torch import Tensor, nn

from algorithms.checks import (
    check_auto_micro_batches,
    check_not_its_own_reference,
    check_numbers,
    check_parallelism,
    check_rule,
    check_same_domains,
    check_same_on_ranks,
    check_same_weights,
    check_settings,
    warn_of_its_own_reference,
)
from algorithms.domain_losses import DomainLosses, OnNonfinite
from algorithms.forward import (
    evaluate_windows,
    gradients_on,
    model_inputs,
    predicts_next,
    reference_on_windows,
)
from algorithms.heldout import HeldOutWindows
from algorithms.intervals import interval, is_due, samples_between
from algorithms.loader_facts import domains_of, planned_samples, sampling_weights, shards_provenance
from algorithms.losses import Normalization, domain_ids_of, labels_of, loss_mask, token_losses, weighted_loss
from algorithms.micro_batch import MicroBatch, add_labels, auxiliary_loss, drop_broken_gradients, share_of_the_sum
from algorithms.presence import warn_of_absences
from algorithms.random_state import random_state, restore_random_state
from algorithms.references import Reference, as_reference
from algorithms.references.frozen import is_encoder_decoder, language_model, logits_of, unwrapped
from algorithms.rule_run import RuleRun
from algorithms.rules.base import Domains, UpdateRule
from algorithms.same_tokenizer import check_room
from algorithms.signals import Signals
from algorithms.trajectory import Rows
from mixer.errors import DataError, InputError
from mixer.mixture import Mixture

__all__ = ["COSTLY", "DomainReweighting"]

log = logging.getLogger(__name__)

VERSION = 1
COSTLY = frozenset({"heldout", "gradients", "gradient_variance"})  # worth an interval between updates
GATHERED = frozenset({"reference", "heldout_reference", "behaviour", "histogram"}) | COSTLY
MAX_LOST_STEPS = 10  # steps in a row without one finite loss, before "skip" gives up


class DomainReweighting(Algorithm):
    """Composer algorithm that runs an update rule and applies its weights to the loss or to the sampling.

    Args:
        rule: for example ``doremi()``. None gathers and logs the losses per domain and changes nothing.
        reference: for rules that need one: a model; the path of a model, or of what ``mixer score`` wrote; target
            losses by domain; or a ``Reference``.
        apply: "loss" multiplies each domain's loss by its weight, and samples are drawn as before; "sampling" hands the
            weights to the loader, and the loss stays the mean over tokens. By default what the rule is made for.
        normalization: how loss weights meet token counts, see ``loss_coefficients``; by default the rule's.
        every: time between updates, in batches ("20ba"), samples ("5000sp") or tokens ("1000000tok"); sums in between
            add up. By default every batch, and every 20 with a rule that evaluates held-out windows or gradients.
        heldout: windows for rules that need them, or the folder of shards whose validation split to take them from.
        gradients_of: parameters that rules on gradients measure: "all", or a function of a parameter's name.
        domains: names in the order of ``domain_ids``, or ``Domains``; by default the loader's.
        min_tokens: tokens of a domain that have to add up before it takes part in an update, see ``RuleRun``.
        on_nonfinite: "fail" stops the run at the first NaN or infinite loss and names the domain; "skip" leaves that
            domain out of the update and its tokens out of the loss, leaves out the optimiser's step where gradients are
            not finite either, and counts both.
        shift: whether the model predicts the next token; found out for Hugging Face models.
        restore_rng: continue the random generators (dropout) exactly when a run is resumed inside an epoch, which
            Composer itself does not do for loaders that resume themselves.

    Raises: InputError: on a setting that cannot work, here or when training starts.

    Logged at Composer's own loss step, for every domain of the batch: ``domain_loss/<name>``, with a reference
    ``domain_excess/<name>`` (mean of loss − reference loss); at updates ``domain_weight/<name>`` and, where it is
    evaluated, ``domain_heldout_loss/<name>`` for all.
    """

    interpolate_loss = True  # tells Composer to warn when a second algorithm replaces the loss

    def __init__(
        self,
        rule: UpdateRule | None = None,
        *,
        reference: Reference | nn.Module | Mapping[str, float] | str | Path | None = None,
        apply: Literal["loss", "sampling"] | None = None,
        normalization: Normalization | None = None,
        every: str | int | None = None,
        heldout: HeldOutWindows | str | Path | None = None,
        gradients_of: str | Callable[[str], bool] = "all",
        domains: Domains | Sequence[str] | None = None,
        min_tokens: int = 0,
        on_nonfinite: OnNonfinite = "fail",
        shift: bool | None = None,
        restore_rng: bool = True,
    ) -> None:
        check_rule(rule)
        self.rule = rule
        self.reference = None if reference is None else as_reference(reference)
        self.target = apply or (rule.applies if rule else "loss")
        self.normalization: Normalization = normalization or (rule.normalization if rule else "domain")
        self.needs = rule.needs if rule else frozenset()
        self.heldout = HeldOutWindows(heldout) if isinstance(heldout, str | Path) else heldout
        self.every = interval(every or ("20ba" if self.needs & COSTLY else "1ba"))
        self.gradients_of = gradients_of
        self.shift = shift
        self.restore_rng = restore_rng
        self.min_tokens = min_tokens
        self.num_skipped_steps = 0
        self._on_nonfinite: OnNonfinite = on_nonfinite
        self._given_domains = domains
        check_settings(rule, self.target, self.normalization, self.reference, self.heldout, GATHERED)
        check_numbers(on_nonfinite, min_tokens, gradients_of)
        self._run: RuleRun | None = None
        self._losses: DomainLosses | None = None
        self._saved: Mapping[str, Any] | None = None
        self._loaded_rng: Sequence[Mapping[str, Any]] | None = None
        self._micro: MicroBatch | None = None
        self._loader: Any = None
        self._drawn_by: NDArray[np.float64] | None = None
        self._heldout_reference: NDArray[np.float64] | None = None

    # ------------------------------------------------------------------ what a person reads off

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains; known once training has started."""
        return self._started().names

    @property
    def weights(self) -> NDArray[np.float64] | None:
        """The weights (D,) in force; None without a rule, or before training has started."""
        return None if self._run is None else self._run.weights

    @property
    def trajectory(self) -> Rows:
        """The history of the run, a row per update (or per step without a rule)."""
        return self._started().trajectory.rows()

    @property
    def num_nonfinite(self) -> dict[str, int]:
        """Steps in which a domain's loss was not finite and was skipped, by name."""
        return dict(zip(self.domains, self._step_losses().num_nonfinite.tolist()))

    def save_trajectory(self, path: str | Path) -> Path:
        """Write ``trajectory`` and the names of the domains as a compressed ``.npz``."""
        return self._started().trajectory.save(path, self.domains)

    def mixture(self, **provenance: Any) -> Mixture:
        """Return the mixture to train the main model on, with what made it; keywords add to the provenance.

        Without a rule it is the mixture that the loader draws by. Raises: InputError: before training has started.
        """
        run = self._started()
        if self.rule is None:
            drawn = sampling_weights(self._loader)
            if drawn is None:
                raise InputError("without a rule, and with a loader that has no weights, there is no mixture.")
            facts = {"rule": None, **shards_provenance(self._loader)}
            return Mixture(dict(zip(run.names, drawn.tolist())), {**facts, **provenance})
        needed = self.rule.first_move(len(run.names))
        if run.num_updates < needed:
            log.warning(
                "after %d updates %r still has the weights it began with: the first that can move them is number %d.",
                run.num_updates,
                self.rule.name,
                needed,
            )
        facts = {
            "rule": self.rule.name,
            "settings": dict(self.rule.settings),
            "updates": run.num_updates,
            "every": str(self.every),
            "apply": self.target,
            "reference": None if self.reference is None else self.reference.fingerprint,
            **({"normalization": self.normalization} if self.target == "loss" else {}),
            **({"min_tokens": self.min_tokens} if self.min_tokens else {}),
            **({"num_nonfinite": self.num_nonfinite} if any(self.num_nonfinite.values()) else {}),
            **shards_provenance(self._loader),
        }
        return Mixture(dict(zip(run.names, run.result.tolist())), {**facts, **provenance})

    def _started(self) -> RuleRun:
        if self._run is None:
            raise InputError("DomainReweighting knows its domains once training has started: call trainer.fit() first.")
        return self._run

    def _step_losses(self) -> DomainLosses:
        self._started()
        assert self._losses is not None
        return self._losses

    # ------------------------------------------------------------------ events

    def match(self, event: Event, state: State) -> bool:
        return event in self._HANDLERS

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        self._HANDLERS[event](self, state, logger)

    def _on_init(self, state: State, logger: Logger) -> None:
        count = sum(isinstance(algorithm, DomainReweighting) for algorithm in state.algorithms)
        if count > 1:
            raise InputError(
                f"{count} DomainReweighting algorithms in one run: each would replace the loss, and a checkpoint keeps "
                "one. Use one rule per run."
            )
        if self._losses is not None:
            raise InputError(
                "this DomainReweighting has served another Trainer and would continue from its weights. Make a new "
                "one; a checkpoint restores its state."
            )

    def _on_fit_start(self, state: State, logger: Logger) -> None:
        if self._run is None:
            self._begin(state)
        loader = self._loader = state.dataloader
        check_same_domains(self.domains, domains_of(self._given_domains, loader).names)
        check_room(self._model, loader, "the model in training")
        if self.reference is not None:
            self.reference.to(next(state.model.parameters()).device)
            self.reference.bind(self.domains, loader)
        if hasattr(loader, "set_weights"):
            # The loader knows its own position: Composer must not skip batches when fit() continues inside an epoch.
            state.dataset_resumption["train"] = True
        if self.rule and self.target == "sampling":
            check_same_weights(self.domains, self.rule.name, sampling_weights(loader), self.weights)
        check_same_on_ranks({**self._identity(), "every": str(self.every), "normalization": self.normalization})
        if self.heldout is not None:
            self.heldout.check(self.domains, shift=self._step_losses().shift)
        if "heldout_reference" in self.needs and self._heldout_reference is None:
            assert self.heldout is not None
            # The windows stay the same, so one pass serves the whole run; without a reference it is the model's own
            # first losses that later ones are compared with.
            found = reference_on_windows(state, self.reference, self.heldout)
            self._heldout_reference = evaluate_windows(state, self.heldout)[0] if found is None else found

    def _begin(self, state: State) -> None:
        domains = domains_of(self._given_domains, state.dataloader)
        check_parallelism(state, self.needs)
        check_auto_micro_batches(state, self.reference, self._on_nonfinite)
        self._model = language_model(state.model)
        self._is_wrapped = isinstance(unwrapped(state.model), HuggingFaceModel)
        self._needs_labels = is_encoder_decoder(self._model)
        self._losses = DomainLosses(
            domains.names,
            normalization=self.normalization,
            on_nonfinite=self._on_nonfinite,
            shift=predicts_next(state.model) if self.shift is None else self.shift,
            histogram="histogram" in self.needs,
        )
        if self.reference is not None:  # bound at every fit(), which may bring another loader
            self._losses.reference, self.reference.shift = self.reference, self._losses.shift
        self._run = RuleRun(self.rule, domains, self.min_tokens)
        self._lost_steps = 0
        if self.target == "sampling" and self.rule and not hasattr(state.dataloader, "set_weights"):
            raise InputError(
                'apply="sampling" needs a loader with set_weights, such as MixtureLoader; '
                f"got {type(state.dataloader).__name__}."
            )
        if self._saved is not None:
            self._restore(self._saved)
        else:
            check_not_its_own_reference(self.rule, self.reference, None if state.fsdp_enabled else self._model)
            if self.rule is not None:
                # Gradients are those of the last batch before an update.
                every = interval(1) if self.needs & {"gradients", "gradient_variance"} else self.every
                warn_of_absences(self.rule, state.dataloader, samples_between(every, state.dataloader))

    def _measured(self, state: State) -> dict[str, Any]:
        """Return what is measured at updates only, by the name of the signal."""
        found: dict[str, Any] = {}
        if "heldout" in self.needs:
            assert self.heldout is not None
            losses, tokens = evaluate_windows(state, self.heldout)
            found |= {"heldout_loss": losses, "heldout_tokens": tokens}
            found |= {"heldout_reference_loss": self._heldout_reference}
        if self.needs & {"gradients", "gradient_variance"}:
            sums = gradients_on(
                state,
                self._whole_batch,
                self._batch_tokens,
                of=self.gradients_of,
                variance="gradient_variance" in self.needs,
                shift=self._step_losses().shift,
            )
            found |= {"gradient_products": sums.products, "gradient_counts": sums.counts}
            found |= {"gradient_variance": sums.variance}
        return found

    def _before_dataloader(self, state: State, logger: Logger) -> None:
        # Afterwards the loader speaks of the batch after this one, which a schedule may draw by other weights.
        self._drawn_by = sampling_weights(self._loader)
        if self._loaded_rng is not None:
            self._restore_generators(state, self._loaded_rng)
        self._loaded_rng = None

    @staticmethod
    def _restore_generators(state: State, saved: Sequence[Mapping[str, Any]]) -> None:
        # At the start of an epoch Composer restores the generators itself, before it makes the loader's iterator.
        inside_epoch = state.timestamp.batch_in_epoch.value > 0 and "train" in state.dataset_resumption
        if inside_epoch and len(saved) == dist.get_world_size():
            restore_random_state(saved[dist.get_global_rank()])
        elif inside_epoch:
            log.warning(
                "resumed on %d ranks what %d ranks saved: dropout continues with other random numbers.",
                dist.get_world_size(),
                len(saved),
            )

    def _batch_start(self, state: State, logger: Logger) -> None:
        # The only event at which state.batch is sure to be the whole batch, also on a retry.
        if self._needs_labels and "labels" not in state.batch:
            raise InputError(f"an encoder-decoder model needs 'labels' in the batch; it has {sorted(state.batch)}.")
        num_samples = None if self._needs_labels else planned_samples(self._loader, state.batch)
        add_labels(state)
        state.batch = {**state.batch, "domain_ids": domain_ids_of(state.batch)}
        losses = self._step_losses()
        losses.start(state.batch, num_samples=num_samples)
        assert losses.num_tokens is not None
        if self.reference is not None:
            state.batch = {**state.batch, **self.reference.columns(state.batch)}
        self._whole_batch, self._batch_tokens = state.batch, losses.num_tokens
        weights = self.weights if self.target == "loss" else None
        self._coefficients = losses.coefficients(weights, self._drawn_by)

    def _before_train_batch(self, state: State, logger: Logger) -> None:
        # Also at every retry of a batch that ran out of memory, and at every call of an optimiser's closure. Losses
        # left over from the attempt before hold all activations of its forward pass.
        self._step_losses().reset()
        self._micro = None

    def _before_forward(self, state: State, logger: Logger) -> None:
        batch = state.batch
        labels = labels_of(batch)
        reference_loss = None
        if self.reference is not None:
            # Before the proxy's activations exist, so that the reference's logits are gone when they do.
            with torch.no_grad(), get_precision_context(state.precision, state.precision_config):
                reference_loss = self.reference.token_losses(batch)
        mask = loss_mask(labels, shift=self._step_losses().shift)
        self._micro = MicroBatch(labels, mask, batch["domain_ids"], reference_loss)
        state.batch = model_inputs(state.model, batch)

    def _after_forward(self, state: State, logger: Logger) -> None:
        if not self._is_wrapped:
            return
        assert self._micro is not None
        state.batch = {**state.batch, "labels": self._micro.labels}
        loss = token_losses(logits_of(state.outputs), self._micro.labels, shift=self._step_losses().shift)
        self._micro = self._micro._replace(token_loss=loss)
        # What HuggingFaceModel.loss returns, and callbacks read: the mean, as the model itself would have computed it.
        mean = loss.sum() / self._micro.mask.sum().clamp(min=1)
        outputs: Any = state.outputs
        if isinstance(outputs, Mapping):
            outputs["loss"] = mean  # type: ignore[index]
        else:
            state.outputs = (mean, *outputs)

    def _before_backward(self, state: State, logger: Logger) -> None:
        losses, micro = self._step_losses(), self._micro
        assert micro is not None
        token_loss = self._token_loss(state, micro)
        losses.add(token_loss, micro.mask, micro.domain_ids, micro.reference_loss)
        usable = losses.usable(token_loss, micro.mask)
        if self.rule is None:
            loss = torch.where(usable, token_loss, torch.zeros_like(token_loss)).sum() / micro.mask.sum().clamp(min=1)
        else:
            share = len(micro.labels) / losses.num_rows
            part = weighted_loss(token_loss, usable, micro.domain_ids, self._coefficients)
            loss = share_of_the_sum(part, state, share)
        extra = auxiliary_loss(state, self._model)
        state.loss = loss if extra is None else {"total": loss + extra, "loss": loss, "auxiliary": extra}
        self._micro = None

    def _token_loss(self, state: State, micro: MicroBatch) -> Tensor:
        """Return the proxy's losses (B, S): taken after the forward, or the model's own where they are per token."""
        if micro.token_loss is not None:
            return micro.token_loss
        own = state.loss.get("loss") if isinstance(state.loss, Mapping) else state.loss
        if isinstance(own, Tensor) and own.shape == micro.mask.shape:
            return own
        return token_losses(logits_of(state.outputs), micro.labels, shift=self._step_losses().shift)

    def _after_train_batch(self, state: State, logger: Logger) -> None:
        # Of half-precision gradients that are scaled, the scaler itself skips the step.
        if self._on_nonfinite == "skip" and state.precision != Precision.AMP_FP16:
            self.num_skipped_steps += drop_broken_gradients(state)

    def _batch_end(self, state: State, logger: Logger) -> None:
        losses, run = self._step_losses(), self._started()
        step = state.timestamp.batch.value - 1  # Composer logged this step's loss before it moved the clock
        before = losses.num_nonfinite
        try:
            signals = losses.signals(run.signature(self._drawn_by))
        except DataError as error:
            raise DataError(f"at step {step} {error}") from error
        self._count_lost(signals, step, any_skipped=bool((losses.num_nonfinite > before).any()))
        if step == 0 and dist.get_global_rank() == 0:
            warn_of_its_own_reference(self.rule, signals)
        if self.reference is not None:
            self.reference.observe(signals)
        if "behaviour" in self.needs:
            signals = signals._replace(behaviour=self._drawn_by)
        run.add(signals)
        metrics = _loss_metrics(run.names, signals, losses.num_nonfinite - before)
        if is_due(self.every, state):
            metrics |= self._update(step, state)
        logger.log_metrics(metrics, step=step)

    def _update(self, step: int, state: State) -> dict[str, float]:
        run = self._started()
        try:
            measured = self._measured(state)
        except torch.OutOfMemoryError as error:
            raise DataError(
                f"at step {step} what {self.rule.name if self.rule else 'no rule'!r} reads did not fit into memory: "
                "evaluate fewer held-out samples at once (HeldOutWindows(batch_size=...)), measure the gradients of "
                "fewer parameters (gradients_of=...), or give a smaller device_train_microbatch_size."
            ) from error
        signals, weights = run.update(step, **measured), run.weights
        if weights is None:
            return {}
        if self.target == "sampling":
            self._loader.set_weights(dict(zip(run.names, weights.tolist())))
        metrics = {f"domain_weight/{name}": float(weight) for name, weight in zip(run.names, weights)}
        if signals.heldout_loss is not None and signals.heldout_tokens is not None:
            means = (signals.heldout_loss / signals.heldout_tokens).tolist()
            metrics |= {f"domain_heldout_loss/{name}": mean for name, mean in zip(run.names, means)}
        return metrics

    def _count_lost(self, signals: Signals, step: int, *, any_skipped: bool) -> None:
        self._lost_steps = 0 if signals.num_tokens.any() else self._lost_steps + 1
        if self._lost_steps < MAX_LOST_STEPS:
            return
        why = (
            "the model has diverged, or its reference. Start again with a lower learning rate"
            if any_skipped
            else "no token bears one. Look at the labels, which are all -100, or at the attention_mask"
        )
        raise DataError(f"no domain had a finite loss in the {MAX_LOST_STEPS} steps up to {step}: {why}.")

    def _eval_batch_start(self, state: State, logger: Logger) -> None:
        add_labels(state)

    _HANDLERS: ClassVar[dict[Event, Callable[[Any, State, Logger], None]]] = {
        Event.INIT: _on_init,
        Event.FIT_START: _on_fit_start,
        Event.BEFORE_DATALOADER: _before_dataloader,
        Event.BATCH_START: _batch_start,
        Event.BEFORE_TRAIN_BATCH: _before_train_batch,
        Event.BEFORE_FORWARD: _before_forward,
        Event.AFTER_FORWARD: _after_forward,
        Event.BEFORE_BACKWARD: _before_backward,
        Event.AFTER_TRAIN_BATCH: _after_train_batch,
        Event.BATCH_END: _batch_end,
        Event.EVAL_BATCH_START: _eval_batch_start,
    }

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return builtins and tensors, the same on every rank, of a size that does not grow with the run."""
        if self._run is None:
            return dict(self._saved or {"version": VERSION})
        return {
            "version": VERSION,
            **self._identity(),
            **self._run.state_dict(),
            "num_nonfinite": self._step_losses().num_nonfinite.tolist(),
            "num_skipped_steps": self.num_skipped_steps,
            "lost_steps": self._lost_steps,
            "heldout_reference": None if self._heldout_reference is None else self._heldout_reference.tolist(),
            "reference_state": {} if self.reference is None else self.reference.state_dict(),
            "rng": dist.all_gather_object(random_state()) if self.restore_rng else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # Called before the loader is known; the domains are compared when training starts.
        self._saved = None if self._given_up(state) else state
        self._loaded_rng = state.get("rng") if self.restore_rng else None
        if self._saved is not None and self._run is not None:
            self._restore(self._saved)

    @staticmethod
    def _given_up(state: Mapping[str, Any]) -> bool:
        if state.get("version") != VERSION:
            raise InputError(
                f"the checkpoint holds DomainReweighting state of version {state.get('version')!r}, this is version "
                f"{VERSION}. Install the version it was saved with."
            )
        return "state" not in state  # saved before training had started

    def _identity(self) -> dict[str, Any]:
        """Return what a checkpoint and this run have to agree on."""
        reference = None if self.reference is None else self.reference.fingerprint
        return {**self._started().identity(), "apply": self.target, "reference": reference}

    def _restore(self, saved: Mapping[str, Any]) -> None:
        for name, mine in self._identity().items():
            if saved[name] != mine:
                raise InputError(
                    f"the checkpoint was saved with {name} {saved[name]!r}, this run has {mine!r}. Continue with the "
                    "same, or start anew with load_ignore_keys=['state/algorithms/*']."
                )
        self._started().load_state_dict(saved)
        self._lost_steps, self.num_skipped_steps = int(saved["lost_steps"]), int(saved.get("num_skipped_steps", 0))
        self._step_losses().num_nonfinite = np.array(saved["num_nonfinite"], dtype=np.int64)
        measured = saved.get("heldout_reference")
        self._heldout_reference = None if measured is None else np.array(measured, dtype=np.float64)
        if self.reference is not None:
            self.reference.load_state_dict(saved["reference_state"])


def _loss_metrics(domains: Sequence[str], signals: Signals, skipped: NDArray[np.int64]) -> dict[str, float]:
    metrics = {}
    for index, name in enumerate(domains):
        if skipped[index]:
            metrics[f"domain_nonfinite/{name}"] = 1.0
        count = signals.num_tokens[index]
        if count == 0:
            continue
        metrics[f"domain_loss/{name}"] = float(signals.loss[index] / count)
        if signals.reference_loss is not None:
            metrics[f"domain_excess/{name}"] = float((signals.loss[index] - signals.reference_loss[index]) / count)
    return metrics
