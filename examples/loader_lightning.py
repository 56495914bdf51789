"""Lightning with exact resume: python examples/loader_lightning.py shards run 4

Called again with more steps it goes on from its last checkpoint, with the very samples that a whole run would have
seen: Lightning keeps the loader's state in its checkpoints by itself.
"""

import sys
from pathlib import Path

import torch

from mixer import MixtureLoader

try:
    import lightning.pytorch as lightning
except ImportError:
    import pytorch_lightning as lightning

shards, folder, steps = sys.argv[1:]
loader = MixtureLoader(shards, mixture="uniform", global_batch_size=8, seed=17)


class Model(lightning.LightningModule):
    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Embedding(vocab, 16), torch.nn.Linear(16, vocab))

    def training_step(self, batch, _):
        tokens = batch["input_ids"]
        loss = torch.nn.functional.cross_entropy(self.layers(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        print(f"step {self.global_step + 1}: loss {loss.item():.9f}, samples {batch['sample_ids'].tolist()}")
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-2)


lightning.seed_everything(0)
trainer = lightning.Trainer(
    max_steps=int(steps),
    accelerator="cpu",
    devices=1,
    use_distributed_sampler=False,
    logger=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    callbacks=[lightning.callbacks.ModelCheckpoint(folder, every_n_train_steps=1, save_last=True)],
)
last = Path(folder, "last.ckpt")
trainer.fit(Model(loader.manifest.tokenizer.vocab_size), loader, ckpt_path=str(last) if last.exists() else None)
print(f"trained to step {trainer.global_step}")
