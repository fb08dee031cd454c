"""`AutoencoderKLWan` in chunks: the feature cache diffusers keeps while it steps through a clip, as tensors that go in and come out.

Enters: frames or latents in the module's dtype on its device, and the cache the previous chunk left. Leaves: parameters of the posterior,
or a video, and the cache for the next chunk, with the batch in front. The steps are diffusers' own (one frame, then groups of four;
latents one by one), so chunking changes no bit. Against the class itself the last 1x1x1 convolution may round otherwise, for it runs
per step here and over the clip there; on a CPU that was seen below 16 latent pixels only.

The cache is an inner matter of diffusers. A stream is therefore tried out before it is used, on noise and with a narrow twin, against the
class's own `encode` and `decode`; `open_stream` says what differs, and its caller goes back to whole clips, loudly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from model.diffusers_vae.clips import Moments, split_moments
from model.diffusers_vae.module import empty_module, filled, full_config, random_weights

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from model.vae import Memory

GROUP = 4  # frames a step, after the first
SIDE = 2  # latent rows and columns of the clip a stream is tried on
WIDTH = 8  # channels of the twin it is tried with, before multipliers


@dataclass(frozen=True, slots=True)
class Slot:
    """A place of the cache that a convolution uses: which, and the shape of what lies there (sides in latent pixels)."""

    place: int
    channels: int
    frames: int
    scale: int


class FeatureCache:
    """The cache of one direction: diffusers' list of places, some of them never used, and our tuple of tensors of fixed shapes.

    After its first step a convolution remembers one frame where it later remembers two, and one of the decoder's remembers only that it was
    there ("Rep"). Both mean zeros in front, so zeros are what is kept: states of videos at different steps then go into one batch.
    """

    def __init__(self, coder: Any) -> None:
        self.places = sum(isinstance(layer, torch.nn.Conv3d) for layer in coder.modules())
        self.slots: tuple[Slot, ...] = ()

    def opened(self, memory: Memory | None) -> list[Any]:
        """The list of diffusers, to be filled in place by its layers."""
        places: list[Any] = [None] * self.places
        if memory is not None:
            for slot, tensor in zip(self.slots, memory, strict=True):
                places[slot.place] = tensor
        return places

    def closed(self, places: Sequence[Any], latent_BCthw: torch.Tensor) -> Memory:
        """The tensors that carry it to the next chunk of the videos behind these latents."""
        return tuple(self._kept(slot, places[slot.place], latent_BCthw) for slot in self.slots)

    @staticmethod
    def _kept(slot: Slot, entry: Any, latent_BCthw: torch.Tensor) -> Any:
        if isinstance(entry, str):
            B, _, _, h, w = latent_BCthw.shape
            return latent_BCthw.new_zeros((B, slot.channels, slot.frames, h * slot.scale, w * slot.scale))
        if entry.shape[2] == slot.frames:
            return entry  # diffusers made it by cloning; nobody writes to it
        return F.pad(entry, (0, 0, 0, 0, slot.frames - entry.shape[2], 0))

    def learn(self, seen: Sequence[Sequence[Any]]) -> None:
        """The slots, from diffusers' list after each step of a trial. Raises ValueError where its shapes have not settled at the end."""
        before, after = ([getattr(entry, "shape", entry) for entry in places] for places in seen[-2:])
        if before != after:
            raise ValueError(f"the cache still changes its shapes in step {len(seen)}")
        used = [(place, shape) for place, shape in enumerate(after) if shape is not None]
        self.slots = tuple(Slot(place, shape[1], shape[2], shape[3] // SIDE) for place, shape in used)


class WanStream:
    """Chunks of any number of groups, both ways. Use `open_stream`, which tries it first."""

    encodes_whole: str | None = None
    decodes_whole: str | None = None

    def __init__(self, module: Any) -> None:
        from diffusers.models.autoencoders import autoencoder_kl_wan as published

        self.module = module
        self._patch = module.config.patch_size or 1
        self._patchify, self._unpatchify = published.patchify, published.unpatchify
        self._encoder_cache, self._decoder_cache = FeatureCache(module.encoder), FeatureCache(module.decoder)

    def encode(self, video_BCTHW: torch.Tensor, memory: Memory | None) -> tuple[Moments, Memory]:
        """Posterior of the chunk (4n+1 frames without memory, else 4n), and the memory for the next one."""
        places = self._encoder_cache.opened(memory)
        parameters = torch.cat(
            [self._encode_step(frames, places) for frames in self._steps(video_BCTHW, first=memory is None)], dim=2
        )
        return split_moments(parameters), self._encoder_cache.closed(places, parameters)

    def decode(self, latent_BCthw: torch.Tensor, memory: Memory | None) -> tuple[torch.Tensor, Memory]:
        """The chunk's frames (4n-3 of the n first latents, else 4n), and the memory for the next one."""
        places = self._decoder_cache.opened(memory)
        video = torch.cat(
            [
                self._decode_step(latent, places, first=memory is None and row == 0)
                for row, latent in enumerate(latent_BCthw.split(1, dim=2))
            ],
            dim=2,
        )
        return self._unpatchify(video, self._patch).clamp(-1.0, 1.0), self._decoder_cache.closed(places, latent_BCthw)

    def _steps(self, video_BCTHW: torch.Tensor, *, first: bool) -> list[torch.Tensor]:
        frames = self._patchify(video_BCTHW, self._patch)
        groups = frames[:, :, 1:] if first else frames
        steps = list(groups.split(GROUP, dim=2)) if groups.shape[2] else []
        return [frames[:, :, :1], *steps] if first else steps

    def _encode_step(self, frames: torch.Tensor, places: list[Any]) -> torch.Tensor:
        features = self.module.encoder(frames.contiguous(), feat_cache=places, feat_idx=[0])
        parameters: torch.Tensor = self.module.quant_conv(features)
        return parameters

    def _decode_step(self, latent: torch.Tensor, places: list[Any], *, first: bool) -> torch.Tensor:
        features = self.module.post_quant_conv(latent.contiguous())
        frames: torch.Tensor = self.module.decoder(features, feat_cache=places, feat_idx=[0], first_chunk=first)
        return frames

    def take_shapes(self, other: WanStream) -> None:
        """The caches' shapes as another stream has learned them."""
        self._encoder_cache.slots, self._decoder_cache.slots = other._encoder_cache.slots, other._decoder_cache.slots

    def learn(self, video_BCTHW: torch.Tensor, latent_BCthw: torch.Tensor) -> None:
        """The shapes in both caches, from three steps of a clip. Raises ValueError where they do not settle."""
        places, seen = self._encoder_cache.opened(None), []
        for frames in self._steps(video_BCTHW, first=True):
            self._encode_step(frames, places)
            seen.append(list(places))
        self._encoder_cache.learn(seen)
        places, seen = self._decoder_cache.opened(None), []
        for row, latent in enumerate(latent_BCthw.split(1, dim=2)):
            self._decode_step(latent, places, first=row == 0)
            seen.append(list(places))
        self._decoder_cache.learn(seen)


@torch.no_grad()
def open_stream(module: Any, space_stride: int) -> WanStream | str:
    """A stream that gives what the class gives, or what speaks against one.

    The comparison is made with a narrow twin of the module, on a CPU; the shapes of its caches are taken on the meta device. Both cost
    little, however wide it is.
    """
    config = full_config(module)
    noise = torch.Generator().manual_seed(0)
    side = SIDE * space_stride
    video = 2 * torch.rand((1, 3, 2 * GROUP + 1, side, side), generator=noise) - 1
    latent = torch.randn((1, module.config.z_dim, 3, SIDE, SIDE), generator=noise)
    try:
        stream, shapes = WanStream(module), WanStream(empty_module("wan", config))
        _compare_with_class(WanStream(narrow_twin(config)), video, latent)
        shapes.learn(video.to("meta"), latent.to("meta"))
        stream.take_shapes(shapes)
    except (TypeError, AttributeError, LookupError, ValueError, RuntimeError, ImportError) as error:
        # whatever another version of diffusers may answer to a call it does not know; the caller says so, and takes clips whole
        return f"{type(error).__name__}: {error}"
    return stream


def narrow_twin(config: Mapping[str, Any]) -> Any:
    """The same layers with few channels and random weights."""
    narrow = {**config, "base_dim": WIDTH, "decoder_base_dim": WIDTH}
    return filled(empty_module("wan", narrow), random_weights(narrow, 0), torch.device("cpu"), torch.float32)


def _compare_with_class(stream: WanStream, video: torch.Tensor, latent: torch.Tensor) -> None:
    """Nine frames and three latents of noise, whole through the class and in two chunks through the stream."""
    stream.learn(video, latent)
    (head, _), memory = stream.encode(video[:, :, : GROUP + 1], None)
    (tail, _), _ = stream.encode(video[:, :, GROUP + 1 :], memory)
    _compare("latents", torch.cat([head, tail], dim=2), stream.module.encode(video).latent_dist.mode())
    first, memory = stream.decode(latent[:, :, :2], None)
    rest, _ = stream.decode(latent[:, :, 2:], memory)
    _compare("videos", torch.cat([first, rest], dim=2), stream.module.decode(latent).sample)


def _compare(what: str, got: torch.Tensor, want: torch.Tensor) -> None:
    """Raises ValueError unless both are the same up to rounding; a cache in the wrong place is off by the size of the values."""
    if got.shape != want.shape:
        raise ValueError(f"{what} of shape {tuple(got.shape)} instead of {tuple(want.shape)}")
    difference, largest = float((got - want).abs().max()), float(want.abs().max())
    if not difference <= 1e-4 * max(1.0, largest):
        raise ValueError(f"{what} differ by {difference:.2e} of {largest:.2e}")
