"""Gradients of each domain's mean loss, their inner products, and their variance over samples.

For rules that look at how domains pull on the parameters (DoGE, PiKE, lookahead DRO). One measurement costs as much as
the forward and backward pass of one step, or one pass per sample where the variance is asked for; take them every
20 or more steps. Memory: D vectors of the size of the parameters measured, or of this rank's shards of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from algorithms.losses import target_domains, weighted_loss
from algorithms.ranks import all_reduce, world_size
from algorithms.sharding import is_sharded, local_part
from mixer.errors import InputError

__all__ = ["GradientSums", "measure_gradients", "measured_parameters"]

# Maps rows of a batch to their token losses and mask, (B, S) each, with gradient.
LossesOf = Callable[[dict[str, Any]], tuple[Tensor, Tensor]]


class GradientSums(NamedTuple):
    """One measurement, the same on every rank: products and counts (D, D), variance (D,); 0 for absent domains."""

    products: NDArray[Any]
    counts: NDArray[Any]
    variance: NDArray[Any]


def measured_parameters(model: nn.Module, of: str | Callable[[str], bool]) -> list[nn.Parameter]:
    """Return the trainable parameters of ``model`` to take gradients of: "all", or those whose name ``of`` accepts.

    Raises: InputError: if there are none.
    """
    accepts = (lambda name: True) if of == "all" else of
    if isinstance(accepts, str):
        raise InputError(f'gradients are measured of "all" parameters or of those a function accepts; got {of!r}.')
    chosen = [parameter for name, parameter in model.named_parameters() if parameter.requires_grad and accepts(name)]
    if not chosen:
        raise InputError("no trainable parameter was chosen to measure gradients of.")
    return chosen


def measure_gradients(
    losses_of: LossesOf,
    batch: Mapping[str, Any],
    num_tokens: Tensor,
    parameters: Sequence[nn.Parameter],
    *,
    rows_at_once: int,
    variance: bool,
) -> GradientSums:
    """Return one measurement on ``batch``, this rank's rows of the global batch.

    Args:
        num_tokens: (D,) loss-bearing tokens over all ranks.
        rows_at_once: samples per forward pass.
        variance: measure each sample on its own. A domain's gradient is then the mean over samples, not over tokens.
    """
    kind = _Sharded if is_sharded(parameters[0]) else _Whole
    gradients = kind(losses_of, batch, parameters)
    if variance:
        return _per_sample(gradients, batch, len(num_tokens))
    rows = []
    for domain in range(len(num_tokens)):
        coefficients = torch.zeros(len(num_tokens), dtype=torch.float64)
        coefficients[domain] = 1.0 / max(float(num_tokens[domain]), 1.0)
        rows.append(gradients.of_rows(_rows_of(batch, domain), rows_at_once, coefficients))
    return _sums(gradients.products(torch.stack(rows)), num_tokens > 0, torch.zeros(len(num_tokens)))


class _Whole:
    """Gradients where every rank holds all parameters: taken by each rank of its own rows, and added up."""

    def __init__(self, losses_of: LossesOf, batch: Mapping[str, Any], parameters: Sequence[nn.Parameter]) -> None:
        self.losses_of, self.batch, self.parameters = losses_of, batch, parameters

    def of_rows(self, rows: Tensor, rows_at_once: int, coefficients: Tensor) -> Tensor:
        """Return the gradient, over all ranks, of the token losses in ``rows`` of each times their coefficient (D,)."""
        total = self.zeros()
        for part in rows.split(rows_at_once) if len(rows) else ():
            total += self.flat(self._weighted(part, coefficients))
        return all_reduce(total)

    def of_samples(self) -> list[tuple[int, Tensor]]:
        """Return the domain and the gradient of the mean token loss of each of this rank's samples."""
        domains = self.batch["domain_ids"].tolist()
        return [(domain, self.flat(self.mean_of(row))) for row, domain in enumerate(domains)]

    def products(self, gradients: Tensor) -> Tensor:
        """Return the inner products (n, n) of the gradients (n, size)."""
        return (gradients @ gradients.T).double().cpu()

    def added(self, sums: Tensor) -> Tensor:
        """Return per-domain sums of ``of_samples`` over all ranks."""
        return all_reduce(sums)

    def added_squares(self, squares: Tensor) -> Tensor:
        """Return per-domain sums, over all ranks and parameters, of the squares of ``of_samples``."""
        return all_reduce(squares)

    def zeros(self) -> Tensor:
        return _zeros(self.parameters)

    def mean_of(self, row: int) -> Tensor:
        loss, mask = self.losses_of(_take(self.batch, torch.tensor([row])))
        return (loss * mask).sum() / mask.sum().clamp(min=1)

    def flat(self, loss: Tensor) -> Tensor:
        # autograd.grad leaves .grad and the hooks of DistributedDataParallel alone.
        gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        return _concatenated(self.parameters, gradients)

    def _weighted(self, rows: Tensor, coefficients: Tensor) -> Tensor:
        part = _take(self.batch, rows)
        loss, mask = self.losses_of(part)
        return weighted_loss(loss, mask, part["domain_ids"], coefficients)


class _Sharded(_Whole):
    """Gradients where each rank holds a part of every parameter (FSDP2), and gets that part of the sum over ranks.

    Every forward and backward pass is one of all ranks together, so a rank that has run out of rows takes part with a
    loss of 0. Under hybrid sharding several ranks hold the same part, and what is added up over parts counts it once.
    """

    def __init__(self, losses_of: LossesOf, batch: Mapping[str, Any], parameters: Sequence[nn.Parameter]) -> None:
        super().__init__(losses_of, batch, parameters)
        self._to_sum = _ranks_per_reduction(parameters[0])
        self._copies = _copies_of_parts(parameters[0])

    def of_rows(self, rows: Tensor, rows_at_once: int, coefficients: Tensor) -> Tensor:
        total = self.zeros()
        for start in range(0, _most(len(rows)), rows_at_once):
            part = rows[start : start + rows_at_once]
            here = self._weighted(part, coefficients) if len(part) else self.mean_of(0) * 0.0
            total += self.flat(here)
        return total

    def of_samples(self) -> list[tuple[int, Tensor]]:
        domains, found = self.batch["domain_ids"].tolist(), []
        for rank in range(world_size()):
            theirs = _shared(domains if dist.get_rank() == rank else None, rank)
            for row, domain in enumerate(theirs):
                mine = dist.get_rank() == rank
                found.append((domain, self.flat(self.mean_of(row) if mine else self.mean_of(0) * 0.0)))
        return found

    def products(self, gradients: Tensor) -> Tensor:
        return all_reduce((gradients @ gradients.T).double()).cpu() / self._copies

    def added(self, sums: Tensor) -> Tensor:
        return sums  # of_samples went over those of all ranks

    def added_squares(self, squares: Tensor) -> Tensor:
        return all_reduce(squares) / self._copies

    def zeros(self) -> Tensor:
        return _zeros([local_part(parameter) for parameter in self.parameters])

    def flat(self, loss: Tensor) -> Tensor:
        kept = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        loss.backward()
        gradients = [None if p.grad is None else local_part(p.grad) for p in self.parameters]
        for parameter, gradient in zip(self.parameters, kept):
            parameter.grad = gradient
        return _concatenated([local_part(parameter) for parameter in self.parameters], gradients) * self._to_sum


def _ranks_per_reduction(parameter: Any) -> float:
    """Return what turns FSDP2's reduced gradients into sums: it asks for means, and gloo gives sums all the same."""
    *replicas, shards = (parameter.device_mesh.get_group(dim) for dim in range(parameter.device_mesh.ndim))
    ranks = dist.get_world_size(shards)
    ones = torch.ones(ranks, device=local_part(parameter).device)
    got = torch.empty(1, device=ones.device)
    dist.reduce_scatter_tensor(got, ones, op=dist.ReduceOp.AVG, group=shards)
    for group in replicas:
        ranks *= dist.get_world_size(group)
        dist.all_reduce(got, op=dist.ReduceOp.AVG, group=group)
    return ranks / got.item()


def _copies_of_parts(parameter: Any) -> int:
    """Return how many ranks hold the same part: one under FSDP2, more under hybrid sharding."""
    return dist.get_world_size() // parameter.device_mesh.size(parameter.device_mesh.ndim - 1)


def _most(count: int) -> int:
    counts: list[Any] = [None] * world_size()
    dist.all_gather_object(counts, count)
    return max(counts)


def _shared(value: list[int] | None, source: int) -> list[int]:
    box = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0] or []


def _zeros(parameters: Sequence[Tensor]) -> Tensor:
    """Return one 0 per parameter, in float32 or better: sums of half-precision gradients need more than their bits."""
    dtype = torch.promote_types(parameters[0].dtype, torch.float32)
    return torch.zeros(sum(p.numel() for p in parameters), dtype=dtype, device=parameters[0].device)


def _concatenated(parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> Tensor:
    return torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(parameters, gradients)]
    )


def _per_sample(gradients: _Whole, batch: Mapping[str, Any], num_domains: int) -> GradientSums:
    if batch["domain_ids"].ndim != 1:
        raise InputError(
            "the variance of gradients over samples needs one domain per sample: domain_ids of shape (B,)."
        )
    sums = torch.stack([gradients.zeros()] * num_domains)
    squares, counts = torch.zeros(num_domains, dtype=torch.float64), torch.zeros(num_domains, dtype=torch.float64)
    for domain, gradient in gradients.of_samples():
        sums[domain] += gradient
        squares[domain] += gradient.double().square().sum().item()
        counts[domain] += 1
    sums, counts = gradients.added(sums), gradients.added(counts)
    mean = sums / counts.clamp(min=1)[:, None].to(sums)
    products = gradients.products(mean)
    spread = gradients.added_squares(squares) - counts * products.diagonal()
    # One sample has no spread; what rounding leaves of the difference is none.
    variance = torch.where(counts > 1, spread.clamp(min=0) / (counts - 1).clamp(min=1), 0.0)
    return _sums(products, counts > 0, variance)


def _sums(products: Tensor, present: Tensor, variance: Tensor) -> GradientSums:
    both = (present[:, None] & present[None, :]).double().cpu()
    return GradientSums(products.numpy(), both.numpy(), variance.double().numpy())


def _rows_of(batch: Mapping[str, Any], domain: int) -> Tensor:
    ids = target_domains(batch["domain_ids"], batch["labels"])
    return torch.nonzero(ids == domain if ids.ndim == 1 else (ids == domain).any(1)).flatten()


def _take(batch: Mapping[str, Any], rows: Tensor) -> dict[str, Any]:
    return {name: value[rows] for name, value in batch.items() if isinstance(value, Tensor)}
