"""A batch as training gets it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(slots=True)
class Batch:
    """What one rank reads in one step. Tensors of facts have one value a latent, on the CPU.

    latents: `B C T h w` on the loader's device; with `Pack` a list of `C T h w`.
    ids, captions: of each latent; a caption is "" where the row has none or it was dropped.
    bucket: name of the shape, `17x256x256`; with `Pack` one for each latent.
    num_frames, fps, duration_s: of the clip, after a crop (int64, float64, float64).
    num_tokens: latent patches of each latent (int64).
    is_image: whether all clips have one frame.
    i2v_cond: where the dataset was opened with it, the condition of each latent: shapes, device, type and normalisation as `latents`.
    members: tensors of paired videos by name, where the dataset was opened with them: as `latents`; of masks `B 1 t h w`, from 0 to 1,
        never normalised.
    metadata: of each row, where the dataset was opened with the column `metadata`, else empty. columns: the other ones,
        of `first_frame` the bytes of image files.
    sidecars: by set and name of the tensor, a tensor of each latent in its stored type and true shape, on the loader's device.
    dataset: number of the dataset in the loader's list. step, epoch: of this dataset.
    sequences: with `Pack`, latents in each packed sequence.
    cu_seqlens: with `Pack`, for each sequence int32 bounds of its latents in tokens, beginning with 0; padding is a last piece.
    grid_sizes: with `Pack`, for each sequence int64 `(n, 3)`, patches of each latent in time, height, width.
    """

    latents: torch.Tensor | list[torch.Tensor] = field(repr=False)
    ids: list[str]
    captions: list[str]
    bucket: str | list[str]
    num_frames: torch.Tensor = field(repr=False)
    fps: torch.Tensor = field(repr=False)
    duration_s: torch.Tensor = field(repr=False)
    num_tokens: torch.Tensor = field(repr=False)
    is_image: bool
    metadata: list[dict[str, Any]]
    dataset: int
    step: int
    epoch: int
    columns: dict[str, list[Any]] = field(default_factory=dict)
    sidecars: dict[str, dict[str, list[torch.Tensor]]] = field(default_factory=dict, repr=False)
    sequences: list[int] = field(default_factory=list)
    cu_seqlens: list[torch.Tensor] = field(default_factory=list, repr=False)
    grid_sizes: list[torch.Tensor] = field(default_factory=list, repr=False)
    i2v_cond: torch.Tensor | list[torch.Tensor] | None = field(default=None, repr=False)
    members: dict[str, torch.Tensor | list[torch.Tensor]] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.ids)

    def device_tensors(self) -> list[torch.Tensor]:
        """Tensors that are on the loader's device."""
        groups = (self.latents, self.i2v_cond, *self.members.values())
        latents = [
            tensor for each in groups for tensor in (each if isinstance(each, list) else [each]) if tensor is not None
        ]
        return [*latents, *(tensor for found in self.sidecars.values() for each in found.values() for tensor in each)]

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, for frameworks that move or inspect mappings."""
        return {item.name: getattr(self, item.name) for item in fields(self)}
