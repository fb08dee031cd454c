"""Interface of every network: `LatentSpec` (plain data, no torch) and the `VideoVAE` protocol.

Shape legend, used in all of `model/`: B batch, C channels, T frames, H W pixels; lower-case c t h w on the latent grid.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from model.posterior import Posterior


@dataclass(frozen=True, slots=True)
class LatentSpec:
    """What a reader of latents must know about the network that made them.

    `scale`/`shift` and `mean`/`std` are recommendations for diffusion training: `(z - shift) * scale` or `(z - mean) / std`.
    They are recorded beside the latents and never applied to them.
    """

    network: str
    latent_channels: int
    time_stride: int = 4
    space_stride: int = 8
    value_range: tuple[float, float] = (-1.0, 1.0)
    lead_frames: int = 1  # frames coded alone before the groups of `time_stride`: 1 (an image first) or 0
    causal: bool = True
    # Of encoding. "exact": chunks give the same bits; "rounding": the same up to float rounding; "none": whole clips only.
    chunking: str = "exact"
    moments: bool = True  # whether the encoder gives a Gaussian; if not, one latent and no log-variance
    scale: float | tuple[float, ...] | None = None
    shift: float | tuple[float, ...] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    channel_semantics: str = ""

    @property
    def frames_rule(self) -> str:
        """Valid frame counts as text, such as `4n+1`."""
        step = "" if self.time_stride == 1 else str(self.time_stride)
        return f"{step}n" if not self.lead_frames or self.time_stride == 1 else f"{step}n+1"

    def latent_frames(self, num_frames: int) -> int:
        """Number of latent frames of a whole video, or of its first chunk, with `num_frames` frames.

        Raises:
            ValueError: `num_frames` does not fit `frames_rule`; names the nearest counts that do.
        """
        # Not `divmod`, which torch.compile cannot trace for changing lengths.
        n, rest = (
            (num_frames - self.lead_frames) // self.time_stride,
            (num_frames - self.lead_frames) % self.time_stride,
        )
        least = self.lead_frames or self.time_stride
        if num_frames < least or rest:
            lower = max(least, num_frames - rest)
            nearest = str(lower) if num_frames < least else f"{lower} or {lower + self.time_stride}"
            raise ValueError(
                f"{self.network} takes {self.frames_rule} frames, got {num_frames}; nearest that fit: {nearest}"
            )
        return n + self.lead_frames

    def check_size(self, height: int, width: int) -> None:
        """Raises ValueError unless both sides are multiples of `space_stride`; names the nearest that are."""
        for side, value in (("height", height), ("width", width)):
            if value < 1 or value % self.space_stride:
                raise ValueError(
                    f"{self.network} takes sides that are multiples of {self.space_stride}, got {side} {value} "
                    f"(of {height}x{width}); nearest that fit: {nearest_multiples(value, self.space_stride)}"
                )

    def on_device(self, kind: str) -> LatentSpec:
        """Spec for a device type ("cpu", "cuda"): only a CPU gives the same bits for chunked encoding."""
        return replace(self, chunking="rounding") if self.chunking == "exact" and kind != "cpu" else self

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, as stored in file metadata."""
        return asdict(self)


def nearest_multiples(value: int, step: int) -> str:
    """Multiples of `step` around `value`, as text."""
    lower = value // step * step
    return f"{lower} or {lower + step}" if lower else str(step)


class VideoVAE(Protocol):
    """Video autoencoder without hidden state: everything a later chunk needs is in the state that a call returns.

    `state=None` starts a video, so a single frame is an image. A state holds tensors whose first axis is the batch; `split_state` and
    `stack_states` regroup it along that axis, so that chunks of different videos can share a batch.
    """

    spec: LatentSpec

    def encode(self, video_BCTHW: torch.Tensor, state: Any = None, *, moments: bool = False) -> tuple[Posterior, Any]:
        """`video_BCTHW` float in `spec.value_range` -> raw posterior (mean `BCthw`), state for the next chunk.

        The first chunk has `time_stride * n + 1` frames, later ones `time_stride * n`.
        """
        ...

    def decode(self, latent_BCthw: torch.Tensor, state: Any = None, *, last: bool = True) -> tuple[torch.Tensor, Any]:
        """Raw latents -> video in (about) `spec.value_range`, not clamped; `last=False`: more latents follow."""
        ...

    def stack_states(self, states: Sequence[Any]) -> Any:
        """States of the same shape -> one state, batches concatenated in order."""
        ...

    def split_state(self, state: Any) -> list[Any]:
        """One state -> states of batch one that own their memory, so that keeping one does not keep the whole batch alive."""
        ...
