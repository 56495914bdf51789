"""A plain PyTorch loop with a checkpoint: python examples/loader_pytorch.py shards

Run it twice: the second run goes on where the first one stopped.
"""

import sys
from pathlib import Path

import torch

from mixer import MixtureLoader

shards, checkpoint = sys.argv[1], Path(sys.argv[2] if len(sys.argv) > 2 else "checkpoint.pt")
loader = MixtureLoader(shards, mixture="uniform", global_batch_size=8, seed=17)
vocab = loader.manifest.tokenizer.vocab_size
model = torch.nn.Sequential(torch.nn.Embedding(vocab, 16), torch.nn.Linear(16, vocab))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

if checkpoint.exists():
    saved = torch.load(checkpoint, weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    loader.load_state_dict(saved["loader"])

stop = loader.step + 4
for batch in loader:
    tokens = batch["input_ids"]
    loss = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {loader.step}: loss {loss.item():.3f}, domains {batch['domain_ids'].tolist()}")
    if loader.step >= stop:
        break

state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "loader": loader.state_dict()}
torch.save(state, checkpoint)
