"""A frozen model as reference: the per-token losses of a model that is run on every batch but never trained."""

from __future__ import annotations

import copy
import inspect
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor, nn

from algorithms.losses import labels_of, token_losses
from algorithms.references.base import Reference
from algorithms.same_tokenizer import check_room, check_tokenizer
from mixer.errors import InputError

__all__ = ["FrozenModel", "fingerprint_of", "is_encoder_decoder", "language_model", "logits_of", "unwrapped"]


class FrozenModel(Reference):
    """The losses of a frozen language model: evaluation mode, no gradient, no dropout.

    It is a copy, so the model given may be the one about to be trained; and it is no ``nn.Module``, so that neither
    checkpoint nor optimiser nor DDP sees it.

    Args:
        model: a Hugging Face causal or encoder-decoder model, Composer's ``HuggingFaceModel`` around one, or any module
            with ``forward(input_ids)`` that returns logits (B, T, V); or the path of a Hugging Face folder or of a
            Composer checkpoint, whole or sharded.
        dtype: convert the weights, for example to ``torch.bfloat16``; losses stay float32.
        sharded: spread the weights over the ranks (FSDP2) instead of keeping all of them on each. Every rank then has
            to ask for losses equally often: the same number of micro-batches.
    """

    def __init__(
        self, model: nn.Module | str | Path, dtype: torch.dtype | None = None, *, sharded: bool = False
    ) -> None:
        self.folder = Path(model) if isinstance(model, str | Path) else None
        source = load_model(model) if isinstance(model, str | Path) else copy.deepcopy(language_model(model))
        self._fingerprint = fingerprint_of(source)
        self.model = source.to(dtype=dtype).eval().requires_grad_(False)
        self._arguments = set(inspect.signature(self.model.forward).parameters)
        self._shift = not is_encoder_decoder(self.model)
        self._in_parts: bool | None = False if sharded else None  # None: found out on the first batch
        self.sharded, self._to_shard = sharded, sharded

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    @torch.no_grad()
    def token_losses(self, batch: Mapping[str, Any]) -> Tensor:
        device = next(self.model.parameters()).device
        labels = labels_of(batch).to(device)
        wanted = self._arguments - {"labels"}
        inputs = {name: value.to(device) for name, value in batch.items() if name in wanted}
        if not self._shift and "decoder_input_ids" not in inputs:
            inputs["decoder_input_ids"] = self.model.prepare_decoder_input_ids_from_labels(labels=labels)
        if self._in_parts is None:
            return self._first_losses(inputs, labels)
        if self._in_parts:
            return _losses_in_parts(self.model, inputs, labels)
        losses = token_losses(logits_of(self.model(**inputs)), labels, shift=self._shift)
        if hasattr(self.model, "reshard"):
            self.model.reshard()  # FSDP2 leaves the outermost module whole, for a backward pass that never comes
        return losses

    def _first_losses(self, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
        """Compute the losses both ways, and settle for parts if that makes no difference for this model."""
        whole = token_losses(logits_of(self.model(**inputs)), labels, shift=self._shift)
        parts = self._losses_of_plain_head(inputs, labels)
        # Not before both are done: a batch that runs out of memory here is tried again in smaller ones.
        self._in_parts = parts is not None and bool(torch.allclose(parts, whole, rtol=1e-3, atol=1e-3))
        return parts if parts is not None and self._in_parts else whole

    def _losses_of_plain_head(self, inputs: dict[str, Tensor], labels: Tensor) -> Tensor | None:
        if not self._shift or not _has_plain_head(self.model):
            return None
        if getattr(self.model.base_model(**inputs), "last_hidden_state", None) is None:
            return None
        return _losses_in_parts(self.model, inputs, labels)

    def bind(self, domains: Sequence[str], loader: Any = None) -> None:
        if self._shift != self.shift:
            kinds = ("a causal model", "an encoder-decoder model")
            raise InputError(
                f"the reference is {kinds[not self._shift]}, the model in training {kinds[not self.shift]}: their "
                "losses are of different tokens. Give a reference of the same kind."
            )
        check_room(self.model, loader, "the reference")
        if self.folder is not None and hasattr(loader, "folder"):
            check_tokenizer(self.folder, loader.folder, loader.manifest)

    def to(self, device: torch.device | str) -> FrozenModel:
        self.model.to(device)
        if self._to_shard and dist.is_initialized():
            self._to_shard = False
            _shard(self.model)
        return self


def _shard(model: nn.Module) -> None:
    """Shard each block of the stacks of layers, then the rest, so that one block at a time is whole."""
    from torch.distributed.fsdp import fully_shard

    for block in _blocks(model):
        fully_shard(block)
    fully_shard(model)


def _blocks(module: nn.Module) -> list[nn.Module]:
    if isinstance(module, nn.ModuleList):
        return list(module)
    return [block for child in module.children() for block in _blocks(child)]


# What some models do to their logits after the last layer; losses in parts would leave it out.
_LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


def _has_plain_head(model: Any) -> bool:
    """Return whether logits are one linear layer on the last hidden states, by all that the model says of itself."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    base = getattr(model, "base_model", None)
    changed = any(getattr(getattr(model, "config", None), name, None) for name in _LOGIT_CHANGES)
    return type(head) is nn.Linear and base is not None and base is not model and not changed


def _losses_in_parts(model: Any, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    """Return the losses (B, T - 1) without ever holding all logits (B, T, V), the largest tensor of a step."""
    hidden, head = model.base_model(**inputs).last_hidden_state, model.get_output_embeddings()
    flat, targets = hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    elements = 1 << 20 if flat.device.type == "cpu" else 1 << 26
    size = max(1, elements // head.out_features)
    parts = zip(flat.split(size), targets.split(size))
    losses = [token_losses(head(rows)[None], some[None], shift=False)[0] for rows, some in parts]
    return torch.cat(losses).view(len(labels), -1)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside DDP's and torch.compile's wrappers."""
    for name in ("module", "_orig_mod"):
        inner = getattr(model, name, None)
        if isinstance(inner, nn.Module):
            return unwrapped(inner)
    return model


def language_model(model: nn.Module) -> Any:
    """Return the Hugging Face model inside Composer's wrapper; any other module itself."""
    model = unwrapped(model)
    inner = getattr(model, "model", None)
    is_composer_wrapper = hasattr(model, "eval_forward") and hasattr(inner, "config")
    return inner if is_composer_wrapper and isinstance(inner, nn.Module) else model


def is_encoder_decoder(model: nn.Module) -> bool:
    """Return whether the model predicts ``labels`` in place (T5), not the next token of its input."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def logits_of(outputs: Any) -> Tensor:
    """Return the logits (B, T, V) in a model's output.

    Raises: InputError: if there are none.
    """
    if isinstance(outputs, Mapping) and "logits" in outputs:
        return outputs["logits"]
    candidates = outputs if isinstance(outputs, tuple | list) else [outputs]
    for value in (getattr(outputs, "logits", None), *candidates):
        if isinstance(value, Tensor) and value.ndim == 3:
            return value
    raise InputError(
        "a language model has to return logits of shape (B, T, V), alone, in a tuple, or as .logits; "
        f"got {type(outputs).__name__}."
    )


def fingerprint_of(model: nn.Module) -> str:
    """Return a digest of the names, shapes, types and values of all parameters and buffers."""
    digest = xxhash.xxh3_128()
    for name, value in sorted(model.state_dict().items()):
        flat = value.detach().cpu().contiguous().flatten()
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(flat.view(torch.uint8).numpy())
    return f"xxh3:{digest.hexdigest()}"


def load_model(path: str | Path) -> Any:
    """Return the model in a Hugging Face folder, or the one inside a Composer checkpoint: a file, or a sharded folder.

    Raises: InputError: if there is none.
    """
    path = Path(path)
    if (path / "config.json").is_file():
        return _from_folder(path)
    if path.is_file():
        return _from_checkpoint(path, path)
    if (path / ".metadata").is_file():
        return _from_sharded_checkpoint(path)
    raise InputError(
        f"no reference model at {path}: expected a Hugging Face folder with config.json and weights, or a Composer "
        "checkpoint (a .pt file, or the folder of a sharded one)."
    )


def _from_sharded_checkpoint(path: Path) -> nn.Module:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole.pt"
        dcp_to_torch_save(path, whole)
        return _from_checkpoint(whole, path)


def _from_folder(path: Path) -> nn.Module:
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    try:
        is_seq2seq = getattr(AutoConfig.from_pretrained(path), "is_encoder_decoder", False)
        kind = AutoModelForSeq2SeqLM if is_seq2seq else AutoModelForCausalLM
        return kind.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"cannot load the reference model in {path}: {reason}.") from error


def _from_checkpoint(path: Path, shown: Path) -> nn.Module:
    from composer.models import HuggingFaceModel
    from composer.utils.checkpoint import safe_torch_load

    try:
        checkpoint = safe_torch_load(str(path))
        saved = checkpoint["state"]["integrations"]["huggingface"]
        # Not the class it was saved with: under FSDP2 that is one which torch has made on the spot.
        is_seq2seq = saved["model"]["config"]["content"].get("is_encoder_decoder", False)
        kind = "transformers.AutoModelForSeq2SeqLM" if is_seq2seq else "transformers.AutoModelForCausalLM"
        model = HuggingFaceModel.load_huggingface_model_from_saved_state(saved, checkpoint, kind, None)
    except (KeyError, TypeError, RuntimeError, EOFError, ValueError, UnpicklingError) as error:
        raise InputError(
            f"{shown} is not a Composer checkpoint of a HuggingFaceModel ({type(error).__name__}: {error}). "
            "Give a Hugging Face folder instead."
        ) from error
    weights = {name.removeprefix("model."): value for name, value in checkpoint["state"]["model"].items()}
    model.load_state_dict(weights)
    return model
