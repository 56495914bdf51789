"""Parameters of which each rank holds a part (FSDP2, also hybrid), and whole ones, handled alike.

part = local_part(value)             this rank's part: what it can read and write without the others
whole = gathered(part, value)        all parts together; every rank has to ask
part = part_of(whole, value)         back to this rank's, on however many ranks
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, distribute_tensor

__all__ = ["gathered", "is_flattened", "is_sharded", "local_part", "part_of"]


def is_sharded(tensor: Tensor) -> bool:
    """Return whether this rank holds a part of ``tensor`` only (FSDP2)."""
    return isinstance(tensor, DTensor)


def is_flattened(model: nn.Module) -> bool:
    """Return whether parameters are flattened together (FSDP1), so that none can be had singly."""
    return any(isinstance(module, FullyShardedDataParallel) for module in model.modules())


def local_part(tensor: Any) -> Tensor:
    """Return this rank's part of ``tensor``, sharing its memory; all of it where it is not sharded."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def gathered(part: Tensor, like: Any) -> Tensor:
    """Return, in main memory, the whole of which each rank brings a ``part`` cut as that of ``like`` is."""
    if not is_sharded(like):
        return part
    # Parts kept in main memory travel as the parameters themselves do: NCCL moves GPU tensors only.
    here, shape = part.to(like.device_mesh.device_type), {"shape": like.shape, "stride": like.stride()}
    return DTensor.from_local(here, like.device_mesh, like.placements, **shape).full_tensor().cpu()


def part_of(whole: Tensor, like: Any) -> Tensor:
    """Return, in main memory, this rank's part of ``whole``, cut as that of ``like`` is; every rank has to ask."""
    if not is_sharded(like):
        return whole
    spread = distribute_tensor(whole.to(like.device_mesh.device_type), like.device_mesh, like.placements)
    return local_part(spread).to("cpu", copy=True)
