"""What the ranks of ``test_domain_reweighting_ranks.py`` run; the same functions give the single-process result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from composer.utils.parallelism import FSDP2Config, ParallelismConfig
from rich.console import Console
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from algorithms import DomainLosses, DomainReweighting, FrozenModel, doremi, group_dro
from algorithms.domain_gradients import measure_gradients, measured_parameters
from algorithms.losses import loss_mask, token_losses, tokens_per_domain
from algorithms.rounds import SearchSettings, find_mixture
from algorithms.rules import UPDATE_RULES
from algorithms.training import TrainSettings
from algorithms.worst_subset import WorstSubset
from mixer.dataloader import MixtureLoader
from mixer.errors import DataError, InputError
from tests.algorithms.every_rule import weights_of_every_rule
from tests.algorithms.ranks import job, main
from tests.algorithms.test_domain_reweighting import heldout_windows, recorder
from tests.algorithms.test_early_stopping import rising
from tests.algorithms.tiny import DOMAINS, Loader, batch, gpt2, llama, wrap
from tests.algorithms.training_helpers import Gradients, fit, flat, parameters


def searching() -> DomainReweighting:
    return DomainReweighting(doremi(), reference=llama(seed=1))


@job
def ddp(folder: Path, rank: int, world_size: int) -> dict[str, Any]:
    """Unequal padding and domains on the ranks, three micro-batches each."""
    algorithm, seen = searching(), Gradients()
    loader = Loader(padded=True, rank=rank, world_size=world_size)
    trainer = fit(algorithm, loader=loader, micro=2, steps=3, callbacks=[seen])
    return {
        "gradients": seen.steps,
        "parameters": parameters(trainer),
        "weights": algorithm.trajectory.weights,
        "tokens": algorithm.trajectory.num_tokens,
        "loss": trainer.state.total_loss_dict["loss/train/total"],
    }


@job
def resume(folder: Path, rank: int, world_size: int) -> dict[str, Any]:
    """Dropout on two ranks, continued from the middle of an epoch."""

    def run(steps: int, **options: Any) -> Any:
        loader = Loader(rank=rank, world_size=world_size)
        return fit(searching(), model=wrap(gpt2(dropout=0.2)), loader=loader, micro=3, steps=steps, **options)

    whole = parameters(run(4))
    run(2, save_folder=str(folder / "resume"), save_interval="2ba")
    resumed = run(4, load_path=str(folder / "resume" / "ep0-ba2-rank0.pt"), seed=5)
    return {"whole": whole, "resumed": parameters(resumed)}


@job
def fsdp2(folder: Path, rank: int, world_size: int) -> dict[str, Any]:
    """Sharded parameters, a replicated reference, a sharded checkpoint and its continuation."""

    def run(steps: int, **options: Any) -> tuple[DomainReweighting, torch.Tensor]:
        algorithm, loader = searching(), Loader(padded=True, rank=rank, world_size=world_size)
        sharded = ParallelismConfig(fsdp2=FSDP2Config())
        # FSDP2 asks for the mean over ranks, and torch's gloo returns the sum: half the rate makes up for it.
        trainer = fit(
            algorithm, loader=loader, micro=2, steps=steps, lr=0.1 / world_size, parallelism_config=sharded, **options
        )
        return algorithm, full_parameters(trainer.state)

    whole, whole_parameters = run(3)
    run(2, save_folder=str(folder / "fsdp2"), save_interval="2ba")
    resumed, resumed_parameters = run(3, load_path=str(folder / "fsdp2" / "ep0-ba2"))
    return {
        "weights": whole.trajectory.weights,
        "parameters": whole_parameters,
        "resumed_weights": resumed.trajectory.weights,
        "resumed_parameters": resumed_parameters,
    }


def full_parameters(state: State) -> torch.Tensor:
    return flat(p.full_tensor() if hasattr(p, "full_tensor") else p for p in state.model.parameters())


@job
def sharded_reference(folder: Path, rank: int, world_size: int) -> dict[str, Any]:
    """A reference that no rank holds whole."""
    reference = FrozenModel(llama(seed=1), sharded=True)
    algorithm = DomainReweighting(doremi(), reference=reference)
    fit(algorithm, loader=Loader(padded=True, rank=rank, world_size=world_size), micro=2, steps=3)
    local = sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in reference.model.parameters())
    return {"weights": algorithm.trajectory.weights, "share": local / llama().num_parameters()}


@job
def search(folder: Path, rank: int, world_size: int) -> dict[str, float]:
    """A whole search in one folder: the first rank writes, the others read what it wrote."""
    steps = TrainSettings(steps=4, global_batch_size=12)
    settings = SearchSettings(method="doremi", reference="cached", proxy=steps, heldout_samples=4)
    return dict(find_mixture(folder / "shards", settings, folder / f"search-{world_size}", Console(quiet=True)).weights)


@job
def worst_subset(folder: Path, rank: int, world_size: int) -> torch.Tensor:
    """The worst part of the global batch, dealt out to the ranks."""
    loader = Loader(padded=True, rank=rank, world_size=world_size)
    return parameters(
        fit(
            WorstSubset(keep=0.5),
            DomainReweighting(UPDATE_RULES["uniform"](), apply="loss"),
            loader=loader,
            micro=2,
            steps=3,
        )
    )


@job
def elastic(folder: Path, rank: int, world_size: int) -> tuple[Any, torch.Tensor]:
    """Continue, on these ranks, what one process has begun."""
    return continued(
        folder, steps=5, world_size=world_size, rank=rank, load_path=str(folder / "one" / "ep0-ba2-rank0.pt")
    )


def continued(folder: Path, steps: int, world_size: int = 1, rank: int = 0, **options: Any) -> tuple[Any, torch.Tensor]:
    shares: dict[str, Any] = {"global_batch_size": 12, "seed": 17, "rank": rank, "world_size": world_size}
    loader, algorithm = MixtureLoader(folder / "shards", mixture="uniform", **shares), searching()
    trainer = fit(algorithm, loader=loader, micro=3, steps=steps, **options)
    return algorithm.trajectory, parameters(trainer)


@job
def gathered(folder: Path, rank: int, world_size: int) -> list[Any]:
    """What the ranks disagree on would show here."""
    algorithm = searching()
    fit(algorithm, loader=Loader(rank=rank, world_size=world_size), steps=2)
    assert algorithm.weights is not None
    return dist.all_gather_object(algorithm.weights.tolist())


@job
def signals(folder: Path, rank: int, world_size: int) -> list[Any]:
    """What rules may ask for, gathered over unequal ranks."""
    found = []
    for needs in ("gradients", "gradient_variance", "heldout", "histogram", "behaviour"):
        rule, seen = recorder(needs)
        algorithm = DomainReweighting(rule, heldout=heldout_windows(), every=1)
        fit(algorithm, loader=Loader(rank=rank, world_size=world_size), micro=3, steps=2)
        found.append(seen)
    return found


@job
def fsdp2_signals(folder: Path, rank: int, world_size: int) -> list[Any]:
    """The same where no rank holds a whole parameter."""
    found = []
    for needs in ("gradients", "gradient_variance", "heldout"):
        rule, seen = recorder(needs)
        algorithm = DomainReweighting(rule, heldout=heldout_windows(), every=1)
        sharded = ParallelismConfig(fsdp2=FSDP2Config())
        loader = Loader(rank=rank, world_size=world_size)
        fit(algorithm, loader=loader, micro=3, steps=2, lr=0.1 / world_size, parallelism_config=sharded)
        found.append(seen)
    return found


@job
def hybrid(folder: Path, rank: int, world_size: int) -> dict[str, Any]:
    """Gradients of parameters that are sharded over some ranks and replicated over others; of two ranks, replicated.

    Composer has hybrid sharding under FSDP1 alone, so the model is one that its owner has sharded.
    """
    asked, sums, model = torch.distributed.all_reduce, torch.distributed.ReduceOp.SUM, llama()

    def all_reduce(tensor: torch.Tensor, op: Any = sums, group: Any = None, async_op: bool = False) -> Any:
        # gloo has no mean, which FSDP2 asks for between replicas; between shards it gives the sum instead, as here.
        return asked(tensor, sums if op == torch.distributed.ReduceOp.AVG else op, group, async_op)

    def losses(part: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        return token_losses(model(input_ids=part["input_ids"]).logits, part["labels"]), loss_mask(part["labels"])

    if world_size > 1:
        mesh = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("replicate", "shard"))
        fully_shard(model, mesh=mesh)
    parts = batch(), batch(rank=rank, world_size=world_size)
    whole, mine = ({**part, "labels": part["input_ids"]} for part in parts)
    tokens = tokens_per_domain(loss_mask(whole["labels"]), whole["domain_ids"], 3)
    measured = measured_parameters(model, "all")
    # FSDP2 takes an event for granted that torch's stand-in for streams of a CPU does not make.
    events = mock.patch.object(torch.cpu.Stream, "record_event", lambda stream: torch.cpu.Event())
    with mock.patch.object(torch.distributed, "all_reduce", all_reduce), events:
        found = [
            measure_gradients(losses, mine, tokens, measured, rows_at_once=2, variance=variance)
            for variance in (False, True)
        ]
    return {"sums": found, "placements": str(getattr(measured[0], "placements", ""))}


@job
def best_model(folder: Path, rank: int, world_size: int) -> dict[str, Any]:
    """The best of a run under FSDP2, with every step as a point to continue from."""

    def run(stopper: Any, **options: Any) -> torch.Tensor:
        sharded = ParallelismConfig(fsdp2=FSDP2Config())
        loader = Loader(rank=rank, world_size=world_size)
        options = {"lr": 1.0 / world_size, "steps": 12, "parallelism_config": sharded, "loader": loader, **options}
        return full_parameters(fit(DomainReweighting(), callbacks=stopper, **options).state)

    found, where = {"expected": run([], steps=2)}, folder / "best"
    found["whole"] = run([rising()], save_folder=str(where), save_interval="1ba")
    for saved_at in (1, 3, 6):  # before the first evaluation, after it, at the end
        stopper = rising()
        found[f"resumed from {saved_at}"] = run([stopper], load_path=str(where / f"ep0-ba{saved_at}"))
        assert (stopper.best_step, stopper.num_worse) == (1, 2)
        assert stopper._best_model["model.layers.0.mlp.up_proj.weight"].shape == (32 // world_size, 16)
    return found


@job
def fsdp1(folder: Path, rank: int, world_size: int) -> dict[str, Any]:
    """Flattened parameters: torch asks CUDA for a device even on a CPU, so here it is told."""
    asked, algorithm = torch.cuda.current_device, searching()
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    try:
        loader = Loader(padded=True, rank=rank, world_size=world_size)
        flattened = {"fsdp": {"sharding_strategy": "FULL_SHARD", "state_dict_type": "sharded"}}
        trainer = fit(algorithm, loader=loader, micro=2, steps=3, parallelism_config=flattened)
        with FullyShardedDataParallel.summon_full_params(trainer.state.model):
            found = parameters(trainer)
        rule, _ = recorder("gradients")
        options = {"loader": Loader(rank=rank, world_size=2), "parallelism_config": flattened}
        refused = raised(lambda: fit(DomainReweighting(rule), **options))
        best = raised(lambda: fit(DomainReweighting(), callbacks=[rising()], **options))
    finally:
        torch.cuda.current_device = asked
    return {"weights": algorithm.trajectory.weights, "parameters": found, "refused": refused, "best": best}


def raised(train: Callable[[], Any]) -> str:
    """Return the message of the error that ends a run."""
    try:
        train()
    except InputError as error:
        return f"InputError: {error}"
    except DataError as error:
        return f"DataError: {error}"
    return "nothing"


class Meddler(Callback):
    """Move one weight on one rank, as a bug would."""

    def __init__(self, algorithm: DomainReweighting) -> None:
        self.algorithm = algorithm

    def batch_end(self, state: State, logger: Logger) -> None:
        run = self.algorithm._run
        if state.timestamp.batch.value == 2 and dist.get_global_rank() == 1 and run is not None:
            run.state.log_weights[0] += 1e-9


@job
def every_rule(folder: Path, rank: int, world_size: int) -> list[Any]:
    """The weights of every rule in the catalogue."""
    return weights_of_every_rule(loader=Loader(rank=rank, world_size=world_size))


@job
def diverged(folder: Path, rank: int, world_size: int) -> dict[str, str]:
    """What happens when a rank goes its own way."""
    mixed_up = searching()
    loader = Loader(rank=rank, world_size=world_size)
    other = DomainReweighting(group_dro(eta=0.1 * (1 + rank)))
    elsewhere = Loader(rank=rank, world_size=world_size)
    elsewhere.set_weights({"books": 0.2 + 0.1 * rank, "code": 0.3 - 0.1 * rank, "web": 0.5})

    def plain_loop() -> None:
        losses, model, part = DomainLosses(DOMAINS), llama(), next(iter(Loader(rank=rank, world_size=world_size)))
        losses(model(input_ids=part["input_ids"]).logits, part, np.array([0.5, 0.3 + 0.1 * rank, 0.2 - 0.1 * rank]))
        losses.signals()

    return {
        "plain_loop": raised(plain_loop),
        "state": raised(lambda: fit(mixed_up, loader=loader, callbacks=[Meddler(mixed_up)], steps=5)),
        "settings": raised(lambda: fit(other, loader=Loader(rank=rank, world_size=world_size), steps=2)),
        "loader": raised(lambda: fit(searching(), loader=elsewhere, steps=2)),
    }


@job
def mixture_loader(folder: Path, rank: int, world_size: int) -> dict[str, Any]:
    """The real loader on several ranks, driven by a sampling rule."""
    options: dict[str, Any] = {"global_batch_size": 12, "seed": 17, "rank": rank, "world_size": world_size}
    loader = MixtureLoader(folder / "shards", mixture="uniform", **options)
    algorithm = DomainReweighting(group_dro(eta=2.0), apply="sampling")
    trainer = fit(algorithm, loader=loader, micro=3, steps=4)
    return {"weights": algorithm.trajectory.weights, "parameters": parameters(trainer), "state": loader.state_dict()}


if __name__ == "__main__":
    main()
