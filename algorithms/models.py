"""Causal language models for references, proxies and main runs: a few small sizes by name, or any Hugging Face one.

    model = build_model("nano", vocab_size=8192, seq_len=512, seed=0)     # random weights
    model = build_model("path/to/config-or-model-folder", vocab_size=8192, seq_len=512, seed=0)

The named sizes are Llama shapes (rotary positions, tied embeddings). A path to a folder with weights continues from
them; a path to a ``config.json`` starts from random weights.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mixer.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["MODEL_SIZES", "build_model", "check_model", "samples_per_forward"]

# name: width, layers, heads. Parameters without embeddings: 0.4 M, 2.4 M, 10 M, 85 M.
MODEL_SIZES = {
    "nano": (128, 2, 4),
    "micro": (256, 3, 8),
    "mini": (384, 6, 8),
    "small": (768, 12, 12),
}


def samples_per_forward(vocab_size: int, seq_len: int, *, limit_bytes: int = 512 * 2**20) -> int:
    """Return how many samples' logits (float32, ``seq_len`` x ``vocab_size``) fit into ``limit_bytes``; at least 1.

    On small models the logits are nearly all of the memory: 32 samples of 512 tokens with 50,000 ids take 3.3 GB, and
    their gradient and softmax as much again.

    >>> samples_per_forward(50_000, 512), samples_per_forward(4_096, 128)
    (5, 256)
    """
    return max(1, limit_bytes // max(4 * vocab_size * seq_len, 1))


def build_model(size: str, *, vocab_size: int, seq_len: int, seed: int) -> PreTrainedModel:
    """Return a causal LM with weights drawn from ``seed`` (or read from a folder).

    Args:
        size: a row of ``MODEL_SIZES``, a folder with ``config.json`` and weights, or the path of a ``config.json``.
        vocab_size: ids that the tokenizer can produce.
        seq_len: tokens per sample.
        seed: for the random weights; the global generator is left as it was.

    Raises: InputError: unknown size, a saved model that is no causal language model, or too small a vocabulary.
    """
    from transformers import LlamaForCausalLM

    if size in MODEL_SIZES:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return LlamaForCausalLM(_llama_config(size, vocab_size, seq_len))
    check_model(size)
    model = _saved(Path(size), seed)
    if model.config.vocab_size < vocab_size:
        raise InputError(
            f"the model {size} has a vocabulary of {model.config.vocab_size}, the shards use {vocab_size} ids. "
            "Use the model's own tokenizer to convert, or another model."
        )
    return model


def check_model(size: str) -> None:
    """Raise InputError unless ``build_model`` has something to build: a named size, or a path that exists."""
    if size not in MODEL_SIZES and not Path(size).exists():
        raise InputError(
            f"no model {size!r}: expected one of {', '.join(MODEL_SIZES)}, a folder with a saved Hugging Face model, "
            "or the path of a config.json."
        )


def _saved(path: Path, seed: int) -> PreTrainedModel:
    """Return the model of a folder, with its weights, or of a configuration, with random ones."""
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        if path.is_dir() and any((path / name).exists() for name in _WEIGHT_FILES):
            model = AutoModelForCausalLM.from_pretrained(os.fspath(path))
        else:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(os.fspath(path)))
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        shown = reason if len(reason) <= 200 else f"{reason[:200]}…"
        raise InputError(f"{path} cannot be loaded as a causal language model: {shown}") from error
    if not _is_causal(model):
        raise InputError(
            f"the model {path} ({type(model).__name__}) sees the tokens that it is to predict: give a causal one."
        )
    return model


@torch.no_grad()
def _is_causal(model: PreTrainedModel) -> bool:
    """Return whether a later token leaves the predictions before it alone, as it does not in models like BERT."""
    ids, was_training = torch.tensor([[0, 1, 0], [0, 1, 1]], device=model.device), model.training
    logits = model.eval()(input_ids=ids).logits[:, :2]
    model.train(was_training)
    return torch.allclose(logits[0], logits[1], rtol=1e-3, atol=1e-4)


_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def _llama_config(size: str, vocab_size: int, seq_len: int) -> Any:
    from transformers import LlamaConfig

    width, layers, heads = MODEL_SIZES[size]
    # Widths of 64: products of odd sizes run at half speed on most processors.
    hidden = 64 * round(width * 8 / 3 / 64)
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=seq_len,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
