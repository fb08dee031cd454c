"""Network and storage type of a dataset's latents, as the metadata of its data files records them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pipeline.format.codec import storage_name, value_type
from pipeline.format.stored import LATENT, STORED, names_in
from pipeline.records import BASE, variant_names

Constant = float | tuple[float, ...] | None


@dataclass(frozen=True, slots=True)
class DatasetSpec:
    """What made the latents and how they are stored. `scale`, `shift`, `mean`, `std`: recommended by the network's authors.

    `dtype`: type that latents are read as. `normalised`: whether these constants were applied before storing. `context_frames`: earlier
    latent frames on which a latent frame depends, None if the network description does not say.
    """

    network: str
    latent_channels: int
    time_stride: int
    space_stride: int
    lead_frames: int
    causal: bool
    dtype: str
    moments: bool
    scale: Constant
    shift: Constant
    mean: Constant
    std: Constant
    normalised: bool
    context_frames: int | None = None
    fingerprint: str = field(default="", compare=False)
    variants: tuple[str, ...] = field(default=(BASE,), compare=False)  # of each clip, in the order of their rows
    stored: tuple[str, ...] = field(
        default=(LATENT,), compare=False
    )  # names of `format.stored`, in the order of a file; also of members that some files are without
    storage: str = field(default="float16", compare=False)  # storage name of `format.codec`

    @classmethod
    def from_metadata(cls, metadata: dict[str, Any]) -> DatasetSpec:
        """From the `latentset` metadata of a data file (docs/formats.md).

        Raises:
            KeyError: a field is missing.
        """
        spec, latent, constants = metadata["spec"], metadata["latent"], metadata["normalisation"]
        storage = storage_name(latent["dtype"], latent.get("compression", "none"))
        return cls(
            network=spec["network"],
            latent_channels=spec["latent_channels"],
            time_stride=spec["time_stride"],
            space_stride=spec["space_stride"],
            lead_frames=spec["lead_frames"],
            causal=spec["causal"],
            dtype=value_type(storage),
            moments=latent["posterior"] == "moments",
            scale=_constant(constants.get("scale")),
            shift=_constant(constants.get("shift")),
            mean=_constant(constants.get("mean")),
            std=_constant(constants.get("std")),
            normalised=bool(constants.get("applied")),
            context_frames=spec.get("context_frames"),
            fingerprint=metadata["fingerprint"],
            variants=variant_names(metadata["fingerprint_parts"]),
            stored=names_in(metadata),
            storage=storage,
        )

    @property
    def members(self) -> tuple[str, ...]:
        """Names of paired videos."""
        return tuple(name for name in self.stored if name not in STORED)

    def latent_frames(self, num_frames: int) -> int:
        """Latent frames of a clip of `num_frames` frames."""
        return (num_frames - self.lead_frames) // self.time_stride + self.lead_frames

    def pixel_frames(self, latent_frames: int) -> int:
        """Frames that the first `latent_frames` latent frames stand for."""
        return (latent_frames - self.lead_frames) * self.time_stride + self.lead_frames

    def grid(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Frames, height and width of the latent of a clip."""
        return self.latent_frames(num_frames), height // self.space_stride, width // self.space_stride


def _constant(value: Any) -> Constant:
    return tuple(map(float, value)) if isinstance(value, list | tuple) else None if value is None else float(value)
