"""Check that all ranks of a run read one order."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError
from pipeline.loader.state import difference

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def order_digest(order: dict[str, Any]) -> str:
    """Hash of what an order depends on, JSON-ready: equal orders, equal digest."""
    return hashlib.blake2b(json.dumps(order, sort_keys=True).encode(), digest_size=16).hexdigest()


def check_same_order(order: dict[str, Any], step: int, world: int, group: ProcessGroup | None) -> None:
    """Compares order, next step and number of data-parallel ranks over a group of `torch.distributed`; nothing where it is not in use.

    Raises:
        ConfigError: on every rank of the group, where one has another order; names the first difference.
    """
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        return
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, {**order, "step": step, "dp_world": world}, group=group)
    for rank, other in enumerate(found):
        for name, value in found[0].items():
            if other.get(name) != value:
                what, first, second = difference(name, value, other.get(name))
                raise ConfigError(
                    f"ranks read different orders: {what} is {first} on rank 0 and {second} on rank {rank} of the group; give all the "
                    "same arguments, and a snapshot by its number (out@3): the newest one changes"
                )
