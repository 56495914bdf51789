"""An update rule inside Hugging Face's ``Trainer``: gradient accumulation, several ranks, checkpoints.

    trainer = ReweightingTrainer(model=model, args=arguments, loader=loader, rule=doremi(), reference=reference)
    trainer.train()                                    # or trainer.train(resume_from_checkpoint="out/checkpoint-50")
    trainer.mixture().save("mixture.json")

``arguments`` need ``max_steps`` (the loader has no end) and ``ignore_data_skip=True`` (it knows its own position). Each
optimiser step reads ``gradient_accumulation_steps`` batches of the loader.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from algorithms.domain_losses import DomainLosses
from algorithms.presence import warn_of_absences
from algorithms.references import as_reference
from algorithms.rules import UpdateRule, state_from_dict, state_to_dict
from mixer import Mixture, MixtureLoader

FILE = "domain_mixer.json"


class ReweightingTrainer(Trainer):
    """A ``Trainer`` that reads a ``MixtureLoader`` and weighs the loss, or the sampling, by an update rule."""

    def __init__(self, *, loader: MixtureLoader, rule: UpdateRule, reference: Any = None, **options: Any) -> None:
        super().__init__(**options)
        if not self.args.ignore_data_skip or self.args.max_steps < 1:
            raise ValueError("TrainingArguments need max_steps >= 1 and ignore_data_skip=True for a MixtureLoader.")
        self.loader, self.rule = loader, rule
        source = None if reference is None else as_reference(reference).to(self.args.device)
        self.losses = DomainLosses(loader, reference=source, normalization=rule.normalization)
        self.rule_state = rule.init(loader)
        warn_of_absences(rule, loader, loader.global_batch_size * self.args.gradient_accumulation_steps)
        self.add_callback(_UpdateWeights(self))

    def get_train_dataloader(self) -> MixtureLoader:
        return self.loader

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any = None) -> tuple[list[Any], Any]:
        batches = [next(epoch_iterator) for _ in range(num_batches)]
        self.losses.start(*batches)
        return batches, None

    def compute_loss(self, model: Any, inputs: dict[str, torch.Tensor], *args: Any, **options: Any) -> torch.Tensor:
        weights = self.rule.weights(self.rule_state) if self.rule.applies == "loss" else None
        loss = self.losses(model(input_ids=inputs["input_ids"]).logits, inputs, weights)
        # These are parts of a sum; Trainer is about to take their mean.
        return loss * self.args.gradient_accumulation_steps

    def train(self, resume_from_checkpoint: str | bool | None = None, **options: Any) -> Any:
        if isinstance(resume_from_checkpoint, str):
            saved = json.loads((Path(resume_from_checkpoint) / FILE).read_text())
            self.loader.load_state_dict(saved["loader"])
            self.rule_state = state_from_dict(self.rule_state, saved["rule"])
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **options)

    def mixture(self) -> Mixture:
        """Return the mixture found so far."""
        weights = dict(zip(self.loader.domains, self.rule.result(self.rule_state).tolist()))
        return Mixture(weights, {"rule": self.rule.name, "settings": dict(self.rule.settings)})


class _UpdateWeights(TrainerCallback):
    def __init__(self, trainer: ReweightingTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **unused: Any) -> None:
        ours = self.trainer
        ours.rule_state, weights = ours.rule.update(ours.rule_state, ours.losses.signals())
        if ours.rule.applies == "sampling":
            ours.loader.set_weights(weights)

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **unused: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero:
            saved = {"loader": self.trainer.loader.state_dict(), "rule": state_to_dict(self.trainer.rule_state)}
            (folder / FILE).write_text(json.dumps(saved))
