"""Lightning with exact resume: python examples/loader_lightning.py shards run 4"""

import sys
from pathlib import Path

import lightning
import torch

from mixer import MixtureLoader

shards, folder, steps = sys.argv[1:]
loader = MixtureLoader(shards, mixture="uniform", global_batch_size=8, seed=17)


class Model(lightning.LightningModule):
    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Embedding(vocab, 16), torch.nn.Linear(16, vocab))

    def training_step(self, batch, _):
        tokens = batch["input_ids"]
        return torch.nn.functional.cross_entropy(self.layers(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-2)


class KeepLoader(lightning.Callback):
    """The loader's state goes into the checkpoint. Lightning fetches one batch ahead: save what has been trained on."""

    def __init__(self) -> None:
        self.state = loader.state_dict()

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.state = loader.state_dict()

    def state_dict(self):
        return {"loader": self.state}

    def load_state_dict(self, state):
        loader.load_state_dict(state["loader"])


trainer = lightning.Trainer(
    max_steps=int(steps),
    accelerator="cpu",
    devices=1,
    use_distributed_sampler=False,
    logger=False,
    enable_progress_bar=False,
    callbacks=[
        KeepLoader(),
        lightning.pytorch.callbacks.ModelCheckpoint(folder, every_n_train_steps=2, save_last=True),
    ],
)
last = Path(folder, "last.ckpt")
trainer.fit(Model(loader.manifest.tokenizer.vocab_size), loader, ckpt_path=str(last) if last.exists() else None)
print(f"trained to step {trainer.global_step}")
