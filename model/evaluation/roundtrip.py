"""One clip through a network and back, chunk by chunk, with what went in beside what came out.

Enters: uint8 YUV planes as decoders give them (the way `lathe encode` goes), or uint8 RGB. Leaves: for each chunk the latents, and 8-bit
frames of original and reconstruction in matching order. Latents are posterior means, float32, not rounded to a storage type.

The original is what the network really saw: its own colour conversion, rounded to 8 bits. The reconstruction is clamped to the network's
range and rounded to 8 bits, as whoever saves or shows it does. Both roundings together are noise at 56 dB: they cost
0.02 dB at 32 dB and 0.1 dB at 40.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from model.colour import yuv_to_video

if TYPE_CHECKING:
    from collections.abc import Callable


class Step(NamedTuple):
    """What one chunk brought. A decoder that looks ahead holds frames back: T is what came out, not what went in."""

    original_CTHW: torch.Tensor  # uint8 RGB
    reconstruction_CTHW: torch.Tensor  # uint8 RGB
    latent_Cthw: torch.Tensor  # float32, of the chunk that went in


class RoundTrip:
    """The way of one clip. Chunks are as the network's `encode` wants them: the first 4n+1 frames, later ones 4n."""

    def __init__(self, vae: Any) -> None:
        """`vae`: a network ready to run (`model.load`)."""
        self._vae = vae
        self._encoding: Any = None
        self._decoding: Any = None
        self._waiting: list[torch.Tensor] = []  # originals whose reconstruction has not come
        self._codes: list[torch.Tensor] = []  # latents, where the network decodes whole clips only

    def push_planes(self, planes_T3HW: torch.Tensor, matrix: str, *, last: bool) -> Step:
        """The next chunk as limited-range uint8 planes `T 3 H W`, and their colour matrix.

        Raises:
            ValueError: as the network's `encode_planes`.
            FloatingPointError: latents or pixels that are not finite.
        """
        planes_BT3HW = planes_T3HW[None].to(self._vae.device)
        low_high = self._vae.spec.value_range
        original = eight_bits(yuv_to_video(planes_BT3HW, [matrix], low_high), low_high)[0]
        return self._step(lambda: self._vae.encode_planes(planes_BT3HW, [matrix], self._encoding), original, last)

    def push_rgb(self, video_CTHW: torch.Tensor, *, last: bool) -> Step:
        """The next chunk as uint8 RGB `3 T H W`. Raises as `push_planes`."""
        if video_CTHW.dtype != torch.uint8:
            raise ValueError(f"expected uint8 RGB (3, T, H, W), got {video_CTHW.dtype} {tuple(video_CTHW.shape)}")
        original = video_CTHW.to(self._vae.device)
        low, high = self._vae.spec.value_range
        video_BCTHW = original[None].to(self._vae.input_dtype) * ((high - low) / 255) + low
        return self._step(lambda: self._vae.encode(video_BCTHW, self._encoding), original, last)

    @torch.inference_mode()
    def _step(self, encode: Callable[[], Any], original_CTHW: torch.Tensor, last: bool) -> Step:
        posterior, self._encoding = encode()
        latent = posterior.mean
        if not latent.isfinite().all():
            raise FloatingPointError("the encoder gave latents that are not finite")
        self._waiting.append(original_CTHW)
        video = self._decode(latent, last)
        if video is None:
            none = original_CTHW[:, :0]
            return Step(none, none, latent[0])
        if not video.isfinite().all():
            raise FloatingPointError("the decoder gave pixels that are not finite")
        frames = eight_bits(video, self._vae.spec.value_range)[0]
        originals = torch.cat(self._waiting, dim=1)
        done = frames.shape[1]
        if done > originals.shape[1] or (last and done != originals.shape[1]):
            raise RuntimeError(f"{self._vae.spec.network} gave {done} frames back for {originals.shape[1]}")
        self._waiting = [originals[:, done:]]
        return Step(originals[:, :done], frames, latent[0])

    def _decode(self, latent_BCthw: torch.Tensor, last: bool) -> torch.Tensor | None:
        """Frames, or None where a network that decodes whole clips still waits for their end."""
        if self._vae.decode_chunking == "none":
            self._codes.append(latent_BCthw)
            if not last:
                return None
            latent_BCthw = torch.cat(self._codes, dim=2)
        video, self._decoding = self._vae.decode(latent_BCthw, self._decoding, last=last)
        return torch.as_tensor(video)


def eight_bits(video: torch.Tensor, value_range: tuple[float, float]) -> torch.Tensor:
    """Floating pixels -> uint8 of the same shape: `value_range` becomes 0..255, what lies outside is clamped, values are rounded."""
    low, high = value_range
    return ((video - low) * (255 / (high - low))).round_().clamp_(0, 255).to(torch.uint8)
