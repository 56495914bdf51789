"""Composer saves and restores the loader through its own checkpoints, mid-epoch, with weights that move."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp

from mixer import MixtureLoader
from tests.helpers import assert_same, write_shards

composer = pytest.importorskip("composer", exc_type=ImportError)
from composer.utils.parallelism import FSDP2Config, ParallelismConfig  # noqa: E402

from algorithms import MixtureMonitor  # noqa: E402


class Tiny(composer.ComposerModel):
    """The least that trains."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(60_000, 2)

    def forward(self, batch):
        return self.embedding(batch["input_ids"])

    def loss(self, outputs, batch):
        return outputs.square().mean()


class Recorder(composer.Callback):
    """Keep what was delivered, and move the weights at every batch."""

    def __init__(self, moving):
        self.batches, self.moving = [], moving

    def after_dataloader(self, state, logger):
        self.batches.append({name: value.clone() for name, value in state.batch.items()})

    def batch_end(self, state, logger):
        if self.moving:
            state.dataloader.set_weights([1, 1, state.timestamp.batch.value])


def train(shards, folder, duration, load=None, callbacks=(), num_workers=0, moving=True, optimized=False, **options):
    recorder, model = Recorder(moving), Tiny()
    transform = {"transform": same, "num_workers": num_workers} if num_workers else {}
    loader = MixtureLoader(shards, mixture="uniform", global_batch_size=12, seed=3, **transform)
    trainer = composer.Trainer(
        model=model,
        train_dataloader=loader,
        optimizers=torch.optim.SGD(model.parameters(), 0.1) if optimized else None,
        max_duration=duration,
        callbacks=[recorder, *callbacks],
        device="cpu",
        progress_bar=False,
        save_folder=str(folder) if folder else None,
        save_interval="1ba",
        save_filename="{batch}.pt",
        save_overwrite=True,
        load_path=str(load) if load else None,
        device_train_microbatch_size=options.pop("microbatch", None),
        **options,
    )
    trainer.fit()
    return recorder.batches, loader, trainer


def same(batch):
    return batch


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"), {"book": 3, "code": 150, "web": 400})


@pytest.mark.filterwarnings("ignore")
def test_checkpoint_of_every_batch_goes_on_to_the_bit(shards, tmp_path):
    whole, loader, _ = train(shards, tmp_path, "6ba")
    assert loader.step == 6 and len(whole) == 6
    for step in (1, 3, 5):
        rest, other, trainer = train(shards, None, "6ba", load=tmp_path / f"{step}.pt")
        assert_same(rest, whole[step:])
        assert other.state_dict() == loader.state_dict()
        trainer.close()


@pytest.mark.filterwarnings("ignore")
def test_dataset_state_in_a_checkpoint_loads_with_weights_only(shards, tmp_path):
    _, loader, _ = train(shards, tmp_path, "2ba")
    saved = torch.load(tmp_path / "2.pt", weights_only=False)["state"]["dataset_state"]["train"]
    torch.save(saved, tmp_path / "state.pt")
    fresh = MixtureLoader(shards, mixture="uniform", global_batch_size=12, seed=3)
    fresh.dataset.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert fresh.state_dict() == loader.state_dict()


@pytest.mark.filterwarnings("ignore")
def test_state_survives_every_kind_of_plain_checkpoint(shards, tmp_path):
    """torch.save with weights_only loading, torch.distributed.checkpoint, JSON: all in the middle of an epoch."""
    whole, _, _ = train(shards, tmp_path, "5ba")
    other = MixtureLoader(shards, mixture="uniform", global_batch_size=12, seed=3)
    trainer_like = {"loader": other.state_dict()}
    _, reader, _ = train(shards, None, "3ba")
    reader.schedule(40, [1, 2, 3], ramp=5)
    state = reader.state_dict()

    torch.save({"loader": state}, tmp_path / "plain.pt")
    loaded = torch.load(tmp_path / "plain.pt", weights_only=True)["loader"]
    assert_same(loaded, state)

    dcp.save({"loader": reader.dataset}, checkpoint_id=tmp_path / "dcp")
    dcp.load({"loader": other.dataset}, checkpoint_id=tmp_path / "dcp")
    assert other.state_dict() == state != trainer_like["loader"]
    assert_same({**next(iter(other))}, whole[3])


@pytest.mark.filterwarnings("ignore")
def test_second_fit_needs_no_callback_in_a_fresh_or_resumed_run_nor_with_workers(shards, tmp_path):
    whole, _, _ = train(shards, None, "8ba")
    found, loader, trainer = train(shards, tmp_path, "3ba")
    trainer.fit(duration="2ba")
    trainer.fit(duration="1ba")
    assert_same(found, whole[:6])
    assert loader.step == 6
    found, _, trainer = train(shards, None, "5ba", load=tmp_path / "3.pt")
    trainer.fit(duration="3ba")
    assert_same(found, whole[3:8])
    ahead, _, _ = train(shards, None, "6ba", num_workers=2)
    found, _, trainer = train(shards, None, "4ba", num_workers=2)
    trainer.fit(duration="2ba")
    assert_same(found, ahead)


@pytest.mark.filterwarnings("ignore")
def test_epochs_of_some_batches_follow_each_other_without_a_gap_over_fits(shards):
    whole, _, _ = train(shards, None, "8ba")
    found, loader, trainer = train(shards, None, "2ep", train_subset_num_batches=3)
    trainer.fit(duration="2ba")
    assert_same(found, whole[:8])
    assert loader.step == 8
    found, _, trainer = train(shards, None, "4ba", train_subset_num_batches=3)
    trainer.fit(duration="4ba")
    assert_same(found, whole[:8])
    assert int(trainer.state.timestamp.batch_in_epoch) == 2, "of the third epoch: the second was ended by its length"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_of_some_batches_is_finished_not_begun_again_after_a_checkpoint(shards, tmp_path, num_workers):
    options = {"train_subset_num_batches": 3, "num_workers": num_workers}
    whole, loader, _ = train(shards, tmp_path, "2ep", **options)
    assert loader.step == 6
    for step in (2, 3):
        rest, other, trainer = train(shards, None, "2ep", load=tmp_path / f"{step}.pt", **options)
        assert_same(rest, whole[step:])
        assert other.state_dict() == loader.state_dict()
        assert int(trainer.state.timestamp.epoch) == 2


@pytest.mark.filterwarnings("ignore")
def test_checkpoint_without_the_loaders_state_lets_composer_skip(shards, tmp_path):
    fixed, _, _ = train(shards, tmp_path, "5ba", moving=False)
    found, _, _ = train(
        shards, None, "5ba", load=tmp_path / "3.pt", load_ignore_keys=["state/dataset_state"], moving=False
    )
    assert_same(found, fixed[3:])


@pytest.mark.filterwarnings("ignore")
def test_microbatches_follow_from_the_loaders_batch_size(shards):
    batches, _, _ = train(shards, None, "2ba", microbatch=4)
    assert [len(batch["input_ids"]) for batch in batches] == [12, 12]


@pytest.mark.filterwarnings("ignore")
def test_second_fit_in_the_same_or_a_resumed_run_goes_on_without_a_gap(shards, tmp_path):
    whole, _, _ = train(shards, None, "7ba")
    found, _, trainer = train(shards, tmp_path, "3ba", callbacks=[MixtureMonitor()])
    trainer.fit(duration="2ba")
    assert_same(found, whole[:5])
    found, _, trainer = train(shards, None, "5ba", load=tmp_path / "3.pt", callbacks=[MixtureMonitor()])
    trainer.fit(duration="2ba")
    assert_same(found, whole[3:7])


@pytest.mark.filterwarnings("ignore")
def test_monitor_logs_the_loaders_metrics_at_the_step_of_the_loss(shards):
    memory = composer.loggers.InMemoryLogger()
    _, loader, _ = train(shards, None, "4ba", callbacks=[MixtureMonitor(every=2)], loggers=[memory])
    values = [value for _, value in memory.data["mixture/web/samples"]]
    assert len(values) == 2 and values[-1] == loader.stats()["domains"]["web"]["samples"]
    assert memory.data["mixture/book/weight"][-1][1] == loader.metrics()["mixture/book/weight"]


def rank_main(rank, world, shards, port, folder, load):
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world),
        NODE_RANK="0",
    )
    composer.utils.dist.initialize_dist("cpu")
    batches, _, _ = train(shards, folder, "4ba", load=load)
    sharded = {"parallelism_config": ParallelismConfig(fsdp2=FSDP2Config()), "optimized": True}
    whole, loader, _ = train(shards, folder / "sharded", "4ba", **sharded)
    rest, other, _ = train(shards, None, "4ba", load=folder / "sharded" / "ep0-ba2", **sharded)
    assert (folder / "sharded" / "ep0-ba2" / ".metadata").exists()  # that of torch.distributed.checkpoint
    assert_same(rest, whole[2:])
    assert other.state_dict() == loader.state_dict()
    torch.save(batches, folder / f"rank{rank}.pt")


@pytest.mark.filterwarnings("ignore")
def test_two_ranks_continue_what_one_rank_began_and_their_own_sharded_checkpoint(shards, tmp_path):
    whole, _, _ = train(shards, tmp_path, "4ba")
    port = 30_000 + os.getpid() % 1000
    mp.spawn(rank_main, args=(2, shards, port, tmp_path, tmp_path / "2.pt"), nprocs=2)
    for rank in range(2):
        parts = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert_same(parts, [{name: value[rank::2] for name, value in batch.items()} for batch in whole[2:]])
    assert np.all([len(batch["input_ids"]) == 12 for batch in whole])
