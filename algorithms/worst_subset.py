"""``WorstSubset``: train on the worst part of a larger batch.

    loader = MixtureLoader("shards", mixture="uniform", global_batch_size=128)
    Trainer(..., train_dataloader=loader, algorithms=[WorstSubset(keep=0.5, reference="bigrams")])

Each step evaluates the whole batch without gradient, and trains on the share of its samples with the highest loss
(above their reference loss, if there is one). The choice is made over all ranks together, and the samples chosen are
dealt out evenly, so it does not depend on the number of ranks. Oren, Sagawa, Hashimoto, Liang 2019, arXiv:1909.02060;
the domain form of the same idea is the rule ``topic_cvar``. With keep = 1/2 and as many samples trained on per step, a
step costs 5/3 of that of weighting by domain: one more forward pass, over twice the samples. (4/3 if the activations of
all of them were kept for the backward pass, at twice the memory.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer.core import Algorithm, Event, State, get_precision_context
from composer.loggers import Logger
from composer.utils import dist
from numpy.typing import NDArray
from torch import Tensor, nn

from algorithms.checks import check_parallelism
from algorithms.forward import evaluation_mode, losses_on, predicts_next
from algorithms.losses import IGNORED, labels_of, loss_mask
from algorithms.references import Reference, as_reference
from algorithms.references.frozen import unwrapped
from algorithms.rules.best_response import worst_case_subset
from mixer.errors import DataError, InputError

__all__ = ["WorstSubset"]


class WorstSubset(Algorithm):
    """Composer algorithm that keeps the worst share of each batch.

    Args:
        keep: share of the global batch to train on, in (0, 1]; rounded up to a multiple of the number of ranks.
        reference: losses to subtract, see ``as_reference``; None for the plain losses.
        rows_at_once: samples per forward pass of the evaluation; by default Composer's micro-batch, and less where that
            does not fit into memory.

    Logged at Composer's own loss step: ``worst_subset/threshold``, the lowest score kept, and ``worst_subset/<name>``,
    the share of each of the loader's domains in what was kept.
    """

    def __init__(
        self,
        keep: float = 0.5,
        *,
        reference: Reference | nn.Module | Mapping[str, float] | str | Path | None = None,
        rows_at_once: int | None = None,
    ) -> None:
        if not 0 < keep <= 1:
            raise InputError(f"keep is the share of a batch to train on, in (0, 1]; got {keep}.")
        self.keep, self.rows_at_once = keep, rows_at_once
        self.reference = None if reference is None else as_reference(reference)

    def match(self, event: Event, state: State) -> bool:
        # Before BATCH_START, where DomainReweighting counts what is left; after the loader's samples were counted.
        return event in (Event.FIT_START, Event.AFTER_DATALOADER)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        if event == Event.FIT_START:
            self._begin(state)
        else:
            self._prune(state, logger)

    def _begin(self, state: State) -> None:
        check_parallelism(state)
        self._shift = predicts_next(state.model)
        if self.reference is not None:
            self.reference.shift = self._shift
            self.reference.to(next(state.model.parameters()).device)
            self.reference.bind(getattr(state.dataloader, "domains", ()), state.dataloader)

    def _prune(self, state: State, logger: Logger) -> None:
        if not self._shift and "labels" not in state.batch:
            raise InputError(f"an encoder-decoder model needs 'labels' in the batch; it has {sorted(state.batch)}.")
        batch = {**state.batch, "labels": labels_of(state.batch).clone()}
        rows = _gathered(batch)
        scores = np.concatenate(dist.all_gather_object(self._scores(state, batch)))
        if not np.isfinite(scores).all():
            raise DataError(f"a loss is not finite at step {state.timestamp.batch.value}: the model has diverged.")
        ranks = dist.get_world_size()
        count = -(-int(np.ceil(self.keep * len(scores) - 1e-9)) // ranks) * ranks
        kept = worst_case_subset(scores, min(count / len(scores), 1.0))
        mine = torch.from_numpy(kept[dist.get_global_rank() :: ranks].copy())
        state.batch = {name: value[mine] for name, value in rows.items()}
        self._log(state, logger, rows, scores, kept)

    @torch.no_grad()
    def _scores(self, state: State, batch: dict[str, Tensor]) -> NDArray[np.float64]:
        """Return the mean loss of each of this rank's samples, minus the reference's."""
        model = state.model if state.fsdp_enabled else unwrapped(state.model)
        columns = {} if self.reference is None else self.reference.columns(batch)
        whole = {**batch, **columns}
        size = self.rows_at_once or int(state.device_train_microbatch_size or len(batch["labels"]))
        with evaluation_mode(model):
            while True:
                try:
                    return self._scores_in_parts(state, model, whole, size)
                except torch.OutOfMemoryError:
                    # Composer's "auto" begins with the whole batch, and catches this in its own forward pass only. The
                    # parts of a sharded model are of all ranks together, and one alone cannot make them smaller.
                    if size == 1 or state.fsdp_enabled:
                        raise
                self.rows_at_once = size = -(-size // 2)

    def _scores_in_parts(
        self, state: State, model: nn.Module, whole: Mapping[str, Tensor], size: int
    ) -> NDArray[np.float64]:
        starts = range(0, len(whole["labels"]), size)
        parts = ({name: value[start : start + size] for name, value in whole.items()} for start in starts)
        return torch.cat([self._excess(state, model, part) for part in parts]).double().cpu().numpy()

    def _excess(self, state: State, model: nn.Module, part: dict[str, Tensor]) -> Tensor:
        part = state.device.batch_to_device(part)
        losses = losses_on(state, model, part, shift=self._shift)
        if self.reference is not None:
            with get_precision_context(state.precision, state.precision_config):
                losses = losses - self.reference.token_losses(part)
        mask = loss_mask(part["labels"], shift=self._shift)
        return torch.where(mask, losses, 0.0).sum(1) / mask.sum(1).clamp(min=1)

    def _log(self, state: State, logger: Logger, rows: dict[str, Tensor], scores: np.ndarray, kept: np.ndarray) -> None:
        metrics = {"worst_subset/threshold": float(scores[kept].min())}
        names = getattr(state.dataloader, "domains", None)
        if names and rows.get("domain_ids") is not None and rows["domain_ids"].ndim == 1:
            shares = np.bincount(rows["domain_ids"].numpy()[kept], minlength=len(names)) / len(kept)
            metrics |= {f"worst_subset/{name}": share for name, share in zip(names, shares.tolist())}
        logger.log_metrics(metrics, step=state.timestamp.batch.value)

    def state_dict(self) -> dict[str, Any]:
        return {}  # nothing is remembered between steps


def _gathered(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of the global batch, rank after rank: a few bytes per token."""
    mine = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    if dist.get_world_size() == 1:
        return mine
    parts = dist.all_gather_object({name: value.numpy() for name, value in mine.items()})
    return {name: torch.from_numpy(_of_one_width([part[name] for part in parts], name)) for name in mine}


def _of_one_width(parts: Sequence[NDArray[Any]], name: str) -> NDArray[Any]:
    """Return the rows of all ranks: each has padded its samples of unequal length to a width of its own."""
    width = max(part.shape[1] if part.ndim > 1 else 0 for part in parts)
    fill = IGNORED if name == "labels" else 0
    padded = (
        np.pad(part, ((0, 0), (0, width - part.shape[1])), constant_values=fill) if width else part for part in parts
    )
    return np.concatenate(list(padded))
