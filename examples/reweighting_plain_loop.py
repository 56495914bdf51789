"""DoReMi's proxy in a training loop of your own: gradient accumulation, several ranks, exact resume.

python examples/reweighting_plain_loop.py shards --reference reference/model --out run
torchrun --nproc-per-node 2 examples/reweighting_plain_loop.py shards --reference reference/model --out run
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from algorithms.domain_losses import DomainLosses
from algorithms.presence import warn_of_absences
from algorithms.references import as_reference
from algorithms.rules import UPDATE_RULES, state_from_dict, state_to_dict
from mixer import Mixture, MixtureLoader


def train(
    model: torch.nn.Module,
    loader: MixtureLoader,
    reference: Any,
    *,
    method: str = "doremi",
    settings: Mapping[str, Any] | None = None,
    steps: int = 100,
    micro_batch_size: int = 4,
    lr: float = 1e-3,
    checkpoint: Path | None = None,
) -> dict[str, float]:
    """Train ``model`` and return the weights found; go on from ``checkpoint`` where there is one."""
    rule = UPDATE_RULES[method](**(settings or {}))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    source = None if reference is None else as_reference(reference)
    losses = DomainLosses(loader, reference=source, normalization=rule.normalization)
    state = rule.init(loader)
    warn_of_absences(rule, loader)
    if checkpoint is not None and checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        loader.load_state_dict(saved["loader"])
        state = state_from_dict(state, saved["rule"])
    network = DistributedDataParallel(model) if torch.distributed.is_initialized() else model
    for batch in itertools.islice(loader, max(steps - loader.step, 0)):
        weights = rule.weights(state) if rule.applies == "loss" else None
        losses.start(batch)  # tokens per domain over all ranks: what makes micro-batches exact
        for part in split(batch, micro_batch_size):
            losses(network(input_ids=part["input_ids"]).logits, part, weights).backward()
        optimizer.step()
        optimizer.zero_grad()
        state, weights = rule.update(state, losses.signals())
        if rule.applies == "sampling":
            loader.set_weights(weights)
        if checkpoint is not None and loader.step % 50 == 0:
            saved = {"loader": loader.state_dict(), "rule": state_to_dict(state)}
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), **saved}, checkpoint)
    return dict(zip(loader.domains, rule.result(state).tolist()))


def split(batch: dict[str, torch.Tensor], size: int) -> list[dict[str, torch.Tensor]]:
    count = len(batch["input_ids"])
    return [{name: value[i : i + size] for name, value in batch.items()} for i in range(0, count, size)]


@click.command()
@click.argument("shards")
@click.option("--reference", required=True, help="A model, or what `mixer score` wrote.")
@click.option("--model", help="A Hugging Face folder; default: a new small Llama.")
@click.option("--out", default="run", type=click.Path(path_type=Path))
@click.option("--steps", default=100)
def main(shards: str, reference: str, model: str | None, out: Path, steps: int) -> None:
    """Find a mixture for SHARDS."""
    if torch.distributed.is_torchelastic_launched():
        torch.distributed.init_process_group("gloo")
    out.mkdir(parents=True, exist_ok=True)
    loader = MixtureLoader(shards, mixture="uniform", global_batch_size=16, seed=17)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=loader.manifest.tokenizer.vocab_size, hidden_size=128, num_hidden_layers=2)
    proxy = AutoModelForCausalLM.from_pretrained(model) if model else LlamaForCausalLM(config)
    found = train(proxy, loader, reference, steps=steps, checkpoint=out / f"rank{loader.rank}.pt")
    if loader.rank == 0:
        print(Mixture(found, {"rule": "doremi", "steps": steps}).save(out / "mixture.json"), found)


if __name__ == "__main__":
    main()
