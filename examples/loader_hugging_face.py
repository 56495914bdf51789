"""Hugging Face Trainer with exact resume: python examples/loader_hugging_face.py shards run 4

The trainer would wrap the loader and skip batches when it resumes; the loader does both better, so it is handed over as
it is, and its state goes into every checkpoint. Called again with more steps it goes on from the last one, with the
very samples that a whole run would have seen.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from mixer import MixtureLoader

shards, folder, steps = sys.argv[1:]
loader = MixtureLoader(
    shards,
    mixture="uniform",
    global_batch_size=8,
    seed=17,
    transform=lambda batch: {**batch, "labels": batch["input_ids"]},
)


class KeepLoader(TrainerCallback):
    def on_save(self, args, state, control, **_):
        path = Path(args.output_dir, f"checkpoint-{state.global_step}", "loader.json")
        path.write_text(json.dumps(loader.state_dict()))


class MixtureTrainer(Trainer):
    def get_train_dataloader(self):
        return loader

    def compute_loss(self, model, inputs, **options):
        tokens = {"input_ids": inputs["input_ids"], "labels": inputs["labels"]}
        loss = super().compute_loss(model, tokens, **options)
        print(f"step {loader.step}: loss {loss.item():.9f}, samples {inputs['sample_ids'].tolist()}")
        return loss


vocab = loader.manifest.tokenizer.vocab_size
config = GPT2Config(vocab_size=vocab, n_positions=loader.manifest.seq_len, n_embd=16, n_layer=1, n_head=1)
arguments = TrainingArguments(
    folder,
    max_steps=int(steps),
    save_steps=1,
    lr_scheduler_type="constant",  # another one would depend on max_steps
    use_cpu=True,
    report_to=[],
    ignore_data_skip=True,
    disable_tqdm=True,
)
torch.manual_seed(0)
trainer = MixtureTrainer(GPT2LMHeadModel(config), arguments, callbacks=[KeepLoader()])
last = get_last_checkpoint(folder) if Path(folder).is_dir() else None
if last:
    loader.load_state_dict(json.loads(Path(last, "loader.json").read_text()))
trainer.train(resume_from_checkpoint=last)
print(f"trained to step {trainer.state.global_step}")
