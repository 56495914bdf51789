"""Models of a few thousand parameters and a loader of synthetic samples, for tests that train for real."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from composer.models import HuggingFaceModel
from torch.utils.data import DataLoader, IterableDataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

DOMAINS = ("books", "code", "web")
VOCAB = 32
SEQ_LEN = 12


def llama(seed: int = 0, **overrides: Any) -> PreTrainedModel:
    settings = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        **overrides,
    }
    config = LlamaConfig(vocab_size=VOCAB, use_cache=False, **{"max_position_embeddings": SEQ_LEN, **settings})
    return _seeded(LlamaForCausalLM, config, seed)


def gpt2(seed: int = 0, dropout: float = 0.0, n_positions: int = SEQ_LEN) -> PreTrainedModel:
    rates = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    sizes = {"n_positions": n_positions, "n_embd": 16, "n_layer": 1, "n_head": 2}
    config = GPT2Config(vocab_size=VOCAB, use_cache=False, **sizes, **rates)
    return _seeded(GPT2LMHeadModel, config, seed)


def t5(seed: int = 0) -> PreTrainedModel:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return _seeded(
        T5ForConditionalGeneration,
        T5Config(vocab_size=VOCAB, decoder_start_token_id=0, dropout_rate=0.0, **sizes),
        seed,
    )


def _seeded(kind: Any, config: Any, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind(config)


def wrap(model: PreTrainedModel) -> HuggingFaceModel:
    return HuggingFaceModel(model, use_logits=True, shift_labels=True)


class Samples(IterableDataset):
    """Sample n of the run is a function of (seed, n) and of the weights in force; position is one number."""

    def __init__(self, seed: int, padded: bool, per_token: bool, rank: int, world_size: int, batch_size: int) -> None:
        self.seed, self.padded, self.per_token = seed, padded, per_token
        self.rank, self.world_size, self.batch_size = rank, world_size, batch_size
        self.weights = np.full(3, 1 / 3)
        self.position = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            first = self.position + self.rank * self.batch_size
            self.position += self.batch_size * self.world_size
            for number in range(first, first + self.batch_size):
                yield self.sample(number)

    def sample(self, number: int) -> dict[str, Any]:
        rng = np.random.default_rng((self.seed, number))
        domain = int(np.searchsorted(np.cumsum(self.weights), rng.random() * 0.999999))
        ids = rng.integers(0, 4 + 10 * domain, SEQ_LEN)
        row: dict[str, Any] = {"input_ids": ids, "domain_ids": domain}
        if self.padded:
            row["attention_mask"] = (np.arange(SEQ_LEN) < rng.integers(3, SEQ_LEN + 1)).astype(np.int64)
        if self.per_token:
            row["domain_ids"] = np.where(np.arange(SEQ_LEN) < rng.integers(1, SEQ_LEN), domain, (domain + 1) % 3)
        return row

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        return {"position": num_samples, "weights": self.weights.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.position = state["position"]
        self.weights = np.array(state["weights"])


class Loader(DataLoader):
    """Stands in for ``MixtureLoader``: domains, weights, ``set_weights``, a position that Composer saves."""

    def __init__(
        self,
        seed: int = 0,
        global_batch_size: int = 12,
        *,
        padded: bool = False,
        per_token: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        size = global_batch_size // world_size
        super().__init__(Samples(seed, padded, per_token, rank, world_size, size), batch_size=size)

    @property
    def domains(self) -> tuple[str, ...]:
        return DOMAINS

    @property
    def weights(self) -> dict[str, float]:
        return dict(zip(DOMAINS, self.dataset.weights.tolist()))

    def set_weights(self, weights: Mapping[str, float]) -> None:
        self.dataset.weights = np.array([weights[name] for name in DOMAINS])


def batch(size: int = 12, **options: Any) -> dict[str, torch.Tensor]:
    """Return the first batch of a loader."""
    return next(iter(Loader(global_batch_size=size, **options)))
