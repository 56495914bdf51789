"""An update rule inside PyTorch Lightning, as a callback.

    reweighting = Reweighting(loader, doremi(), reference)
    module = CausalLM(model, reweighting)                   # its training_step takes the loss from the callback
    trainer = pl.Trainer(max_steps=1000, callbacks=[reweighting], use_distributed_sampler=False)
    trainer.fit(module, Steps(loader, 1000))                # ckpt_path="last.ckpt" continues
    reweighting.mixture().save("mixture.json")

One batch per optimiser step: Lightning does not tell a callback which batches a step will have.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytorch_lightning as pl
import torch

from algorithms.domain_losses import DomainLosses
from algorithms.presence import warn_of_absences
from algorithms.references import as_reference
from algorithms.rules import UpdateRule, state_from_dict, state_to_dict
from mixer import Mixture, MixtureLoader


class Steps:
    """A loader with a length: of one without, Lightning reads a batch ahead, and new weights would come too late."""

    def __init__(self, loader: MixtureLoader, steps: int) -> None:
        self.loader, self.steps = loader, steps

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return iter(self.loader)

    def __len__(self) -> int:
        return self.steps


class Reweighting(pl.Callback):
    """Weighs the loss, or the sampling, by an update rule; saved and restored with Lightning's checkpoints."""

    def __init__(self, loader: MixtureLoader, rule: UpdateRule, reference: Any = None) -> None:
        self.loader, self.rule = loader, rule
        source = None if reference is None else as_reference(reference)
        self.losses = DomainLosses(loader, reference=source, normalization=rule.normalization)
        self.rule_state = rule.init(loader)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.accumulate_grad_batches != 1:
            raise ValueError(
                f"one batch per step: accumulate_grad_batches is {trainer.accumulate_grad_batches}, not 1."
            )
        warn_of_absences(self.rule, self.loader)
        if self.losses.reference is not None:
            self.losses.reference.to(pl_module.device)

    def loss(self, logits: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the loss of a training step."""
        weights = self.rule.weights(self.rule_state) if self.rule.applies == "loss" else None
        return self.losses(logits, batch, weights)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *unused: Any) -> None:
        self.rule_state, weights = self.rule.update(self.rule_state, self.losses.signals())
        if self.rule.applies == "sampling":
            self.loader.set_weights(weights)
        pl_module.log_dict({f"domain_weight/{name}": w for name, w in zip(self.loader.domains, weights.tolist())})

    def state_dict(self) -> dict[str, Any]:
        return {"loader": self.loader.state_dict(), "rule": state_to_dict(self.rule_state)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.loader.load_state_dict(state_dict["loader"])
        self.rule_state = state_from_dict(self.rule_state, state_dict["rule"])

    def mixture(self) -> Mixture:
        """Return the mixture found so far."""
        weights = dict(zip(self.loader.domains, self.rule.result(self.rule_state).tolist()))
        return Mixture(weights, {"rule": self.rule.name, "settings": dict(self.rule.settings)})


class CausalLM(pl.LightningModule):
    """The smallest module that trains a Hugging Face model with ``Reweighting``."""

    def __init__(self, model: torch.nn.Module, reweighting: Reweighting, lr: float = 1e-3) -> None:
        super().__init__()
        self.model, self._reweighting, self.lr = model, [reweighting], lr

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self._reweighting[0].loss(self.model(input_ids=batch["input_ids"]).logits, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)
