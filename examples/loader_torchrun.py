"""Several ranks share every global batch: torchrun --nproc-per-node 2 examples/loader_torchrun.py shards

With one rank or four the same global batches come, in the same order.
"""

import sys

import torch
import torch.distributed as dist

from mixer import MixtureLoader

dist.init_process_group("gloo")
loader = MixtureLoader(sys.argv[1], mixture="uniform", global_batch_size=8, seed=17)  # takes rank and world size itself
vocab = loader.manifest.tokenizer.vocab_size
model = torch.nn.Sequential(torch.nn.Embedding(vocab, 16), torch.nn.Linear(16, vocab))
model = torch.nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)

for batch in loader:
    tokens = batch["input_ids"]
    loss = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(
        f"rank {loader.rank} of {loader.world_size}, step {loader.step}: samples {batch['sample_ids'].tolist()}\n",
        end="",
    )
    if loader.step >= 3:
        break
dist.destroy_process_group()
