"""One row of a dataset with its tensors, and memory for tensors in their stored type."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Row:
    """`latent`, `logvar` and `i2v_cond` are `C t h w` in the stored type, raw and unnormalised; None where tensors were not asked for,
    `logvar` where moments are not stored, `i2v_cond` unless the dataset was opened with it. `columns`: those that it was opened with;
    `first_frame`, the bytes of an image file, only together with tensors. `members`: tensors of paired videos that it was opened with, by
    name, like `latent`; masks `1 t h w`.
    """

    id: str
    bucket: str
    num_frames: int
    caption: str | None
    shape: tuple[int, ...]
    source_uri: str
    source_key: str
    latent: torch.Tensor | None = field(default=None, repr=False)
    logvar: torch.Tensor | None = field(default=None, repr=False)
    columns: dict[str, Any] = field(default_factory=dict)
    i2v_cond: torch.Tensor | None = field(default=None, repr=False)
    members: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)


def empty_tensor(shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    """A new tensor of a storage type (`float16`, `bfloat16`, `float32`), or of `uint8`."""
    import torch

    kind: torch.dtype = getattr(torch, dtype)
    return torch.empty(shape, dtype=kind)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor, writable."""
    import torch

    return tensor.view(-1).view(torch.uint8).numpy().data
