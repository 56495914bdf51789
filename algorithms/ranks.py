"""Sums over ranks, and the check that all ranks still hold the same thing."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from mixer.errors import DataError

__all__ = ["all_reduce", "all_reduce_checked", "rank", "wait_for_all", "world_size"]

SIGNATURE_BITS = 53  # what a float64 holds exactly


def world_size() -> int:
    """Return the number of ranks, 1 outside of torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this rank, 0 outside of torch.distributed."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def wait_for_all() -> None:
    """Wait until every rank has come here, as when one of them writes what all read."""
    if world_size() > 1:
        dist.barrier()


def all_reduce(tensor: Tensor) -> Tensor:
    """Return the sum of ``tensor`` over all ranks, on the device it came from; itself where there is one rank."""
    if world_size() == 1:
        return tensor
    # NCCL moves GPU tensors only; counts are made on the CPU.
    total = tensor.cuda() if dist.get_backend() == "nccl" and not tensor.is_cuda else tensor.clone()
    dist.all_reduce(total)
    return total.to(tensor.device)


def all_reduce_checked(tensor: Tensor, signature: int) -> Tensor:
    """Return the sum of a float64 ``tensor`` over all ranks, which must all come with the same ``signature``.

    The signatures travel with the sum, one number per rank, so that the check costs no communication of its own.

    Args:
        signature: what the ranks have to agree on, as a digest; its lowest 53 bits count.

    Raises: DataError: on every rank alike, naming the ranks that differ from most.
    """
    ranks = world_size()
    if ranks == 1:
        return tensor
    slots = torch.zeros(ranks, dtype=torch.float64, device=tensor.device)
    slots[rank()] = float(signature % 2**SIGNATURE_BITS)
    total = all_reduce(torch.cat([tensor.double().flatten(), slots]))
    _check_equal(total[-ranks:].tolist())
    return total[:-ranks].view(tensor.shape).to(tensor.dtype)


def _check_equal(signatures: list[float]) -> None:
    if len(set(signatures)) == 1:
        return
    common = max(signatures, key=lambda value: (signatures.count(value), value == signatures[0]))
    others = [number for number, value in enumerate(signatures) if value != common]
    who = f"rank {others[0]} holds" if len(others) == 1 else f"the ranks {others} hold"
    raise DataError(
        f"{who} other domain weights, or another state of the update rule, than rank {signatures.index(common)}: the "
        "ranks have diverged, and each would optimise something else. Give all ranks the same settings and checkpoint, "
        "and continue from the last checkpoint."
    )
