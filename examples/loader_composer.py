"""Composer saves and restores the loader by itself: python examples/loader_composer.py shards run 4"""

import sys

import composer
import torch

from mixer import MixtureLoader


class Model(composer.ComposerModel):
    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Embedding(vocab, 16), torch.nn.Linear(16, vocab))

    def forward(self, batch: dict) -> torch.Tensor:
        return self.layers(batch["input_ids"][:, :-1])

    def loss(self, outputs: torch.Tensor, batch: dict) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(outputs.flatten(0, 1), batch["input_ids"][:, 1:].flatten())


shards, folder, steps = sys.argv[1:]
loader = MixtureLoader(shards, mixture="uniform", global_batch_size=8, seed=17)
trainer = composer.Trainer(
    model=Model(loader.manifest.tokenizer.vocab_size),
    train_dataloader=loader,
    max_duration=f"{steps}ba",
    device="cpu",
    run_name="example",
    save_folder=folder,
    save_interval="1ba",
    autoresume=True,  # with more steps it goes on from the last checkpoint, in the middle of the epoch
    progress_bar=False,
)
trainer.fit()
print(f"trained to step {trainer.state.timestamp.batch.value}; the loader stands at {loader.step}")
