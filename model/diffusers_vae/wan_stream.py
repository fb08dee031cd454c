"""`AutoencoderKLWan` and `AutoencoderKLQwenImage` in chunks: diffusers' feature cache, passed in and out as tensors.

Takes frames or latents in the module's dtype, on its device, and the cache of the previous chunk; returns the posterior's parameters or a
video, and the cache for the next chunk, with the batch first. The steps are those of diffusers (one frame, then groups of four;
latents one by one), so chunking changes no bit. Compared with the class itself, the last 1x1x1 convolution may round differently,
because it runs per step here and over the clip there; on a CPU this was seen below 16 latent pixels only. Not by `model.history`: the
layers keep their frames in diffusers' list, and would have to be rewritten as those of `causal_stream` are.

The cache is not part of diffusers' interface. So a stream is tested before use, with noise and a narrow copy of the network, against the
class's own `encode` and `decode`; if they differ, `open_stream` returns the reason and its caller warns and uses whole clips.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from model.diffusers_vae.clips import Moments, split_moments
from model.diffusers_vae.module import empty_module, filled, full_config, random_weights

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from model.history import StateTensors


GROUP = 4  # frames per step after the first
SIDE = 2  # latent rows and columns of the test clip
# Options that are not read by the network itself: its normalisation, and the ratios that diffusers' pipelines read.
NOT_BUILT = ("latents_mean", "latents_std", "scale_factor_temporal", "scale_factor_spatial")
WIDTH = 8  # channels of the narrow copy used for the test, before multipliers


@dataclass(frozen=True, slots=True)
class CacheSlot:
    """Entry of the cache that a convolution uses: its index, and the shape of its tensor (`scale`: side per latent pixel)."""

    index: int
    channels: int
    frames: int
    scale: int


class FeatureCache:
    """Feature cache of one direction, converted between diffusers' list of entries (some unused) and a tuple of tensors of fixed shapes.

    After its first step a convolution holds one frame instead of two, and one of the decoder's holds the marker "Rep". Both stand
    for zeros in front, so zeros are stored: states of videos at different steps can then share a batch.
    """

    def __init__(self, coder: Any) -> None:
        self.entries = sum(isinstance(layer, torch.nn.Conv3d) for layer in coder.modules())
        self.slots: tuple[CacheSlot, ...] = ()

    def as_list(self, memory: StateTensors | None) -> list[Any]:
        """The cache as diffusers' list, which its layers update in place."""
        entries: list[Any] = [None] * self.entries
        if memory is not None:
            for slot, tensor in zip(self.slots, memory, strict=True):
                entries[slot.index] = tensor
        return entries

    def as_tensors(self, entries: Sequence[Any], latent_BCthw: torch.Tensor) -> StateTensors:
        """The cache as tensors for the next chunk; `latent_BCthw` gives batch and sizes."""
        return tuple(self._kept(slot, entries[slot.index], latent_BCthw) for slot in self.slots)

    @staticmethod
    def _kept(slot: CacheSlot, entry: Any, latent_BCthw: torch.Tensor) -> Any:
        if isinstance(entry, str):
            B, _, _, h, w = latent_BCthw.shape
            return latent_BCthw.new_zeros((B, slot.channels, slot.frames, h * slot.scale, w * slot.scale))
        if entry.shape[2] == slot.frames:
            return entry  # a clone made by diffusers, which is not modified afterwards
        return F.pad(entry, (0, 0, 0, 0, slot.frames - entry.shape[2], 0))

    def learn_shapes(self, seen: Sequence[Sequence[Any]]) -> None:
        """Sets the slots from diffusers' list after each step of a trial. Raises ValueError if the shapes still change in the last step."""
        before, after = ([getattr(entry, "shape", entry) for entry in entries] for entries in seen[-2:])
        if before != after:
            raise ValueError(f"the cache still changes its shapes in step {len(seen)}")
        used = [(index, shape) for index, shape in enumerate(after) if shape is not None]
        self.slots = tuple(CacheSlot(index, shape[1], shape[2], shape[3] // SIDE) for index, shape in used)


class WanStream:
    """Coder for chunks of any number of groups. Use `open_stream`, which tests it first."""

    encodes_whole: str | None = None
    decodes_whole: str | None = None

    def __init__(self, module: Any) -> None:
        from diffusers.models.autoencoders import autoencoder_kl_wan as published

        self.module = module
        self._wan = (
            type(module).__name__ == "AutoencoderKLWan"
        )  # Qwen-Image has neither patches nor the residual decoder
        self._patch = (module.config.patch_size or 1) if self._wan else 1
        self._patchify, self._unpatchify = published.patchify, published.unpatchify
        self._encoder_cache, self._decoder_cache = FeatureCache(module.encoder), FeatureCache(module.decoder)

    def encode(self, video_BCTHW: torch.Tensor, memory: StateTensors | None) -> tuple[Moments, StateTensors]:
        """Posterior of the chunk (4n+1 frames without memory, else 4n), and the cache for the next one."""
        entries = self._encoder_cache.as_list(memory)
        parameters = torch.cat(
            [self._encode_step(frames, entries) for frames in self._steps(video_BCTHW, first=memory is None)], dim=2
        )
        return split_moments(parameters), self._encoder_cache.as_tensors(entries, parameters)

    def decode(self, latent_BCthw: torch.Tensor, memory: StateTensors | None) -> tuple[torch.Tensor, StateTensors]:
        """Frames of the chunk (4n-3 for the first n latents, else 4n), and the cache for the next one."""
        entries = self._decoder_cache.as_list(memory)
        video = torch.cat(
            [
                self._decode_step(latent, entries, first=memory is None and row == 0)
                for row, latent in enumerate(latent_BCthw.split(1, dim=2))
            ],
            dim=2,
        )
        return self._unpatchify(video, self._patch).clamp(-1.0, 1.0), self._decoder_cache.as_tensors(
            entries, latent_BCthw
        )

    def _steps(self, video_BCTHW: torch.Tensor, *, first: bool) -> list[torch.Tensor]:
        frames = self._patchify(video_BCTHW, self._patch)
        groups = frames[:, :, 1:] if first else frames
        steps = list(groups.split(GROUP, dim=2)) if groups.shape[2] else []
        return [frames[:, :, :1], *steps] if first else steps

    def _encode_step(self, frames: torch.Tensor, entries: list[Any]) -> torch.Tensor:
        features = self.module.encoder(frames.contiguous(), feat_cache=entries, feat_idx=[0])
        parameters: torch.Tensor = self.module.quant_conv(features)
        return parameters

    def _decode_step(self, latent: torch.Tensor, entries: list[Any], *, first: bool) -> torch.Tensor:
        features = self.module.post_quant_conv(latent.contiguous())
        options = {"first_chunk": first} if self._wan else {}
        frames: torch.Tensor = self.module.decoder(features, feat_cache=entries, feat_idx=[0], **options)
        return frames

    def copy_shapes(self, other: WanStream) -> None:
        """Copies the cache shapes that another stream has learned."""
        self._encoder_cache.slots, self._decoder_cache.slots = other._encoder_cache.slots, other._decoder_cache.slots

    def learn_shapes(self, video_BCTHW: torch.Tensor, latent_BCthw: torch.Tensor) -> None:
        """Learns the shapes of both caches from three steps of a clip. Raises ValueError if they still change."""
        entries, seen = self._encoder_cache.as_list(None), []
        for frames in self._steps(video_BCTHW, first=True):
            self._encode_step(frames, entries)
            seen.append(list(entries))
        self._encoder_cache.learn_shapes(seen)
        entries, seen = self._decoder_cache.as_list(None), []
        for row, latent in enumerate(latent_BCthw.split(1, dim=2)):
            self._decode_step(latent, entries, first=row == 0)
            seen.append(list(entries))
        self._decoder_cache.learn_shapes(seen)


def open_stream(module: Any, space_stride: int) -> WanStream | str:
    """A stream whose results equal those of the class, or the reason why there is none.

    The comparison uses a narrow copy of the module on a CPU, and the cache shapes come from the meta device, so both are fast; a process
    tests each configuration once.
    """
    config = {key: value for key, value in full_config(module).items() if key not in NOT_BUILT}
    tested = _tested_stream(json.dumps(config, sort_keys=True), space_stride)
    if isinstance(tested, str):
        return tested
    stream = WanStream(module)
    stream.copy_shapes(tested)
    return stream


@cache
@torch.no_grad()
def _tested_stream(config_json: str, space_stride: int) -> WanStream | str:
    """A tested stream of a network on the meta device, which knows the shapes of its cache, or the reason why there is none."""
    config = json.loads(config_json)
    noise = torch.Generator().manual_seed(0)
    side = SIDE * space_stride
    video = 2 * torch.rand((1, 3, 2 * GROUP + 1, side, side), generator=noise, dtype=torch.float32) - 1
    latent = torch.randn((1, config["z_dim"], 3, SIDE, SIDE), generator=noise, dtype=torch.float32)
    try:
        stream = WanStream(torch.nn.Module.to(empty_module("wan", config), dtype=torch.float32))
        _compare_with_class(WanStream(narrow_copy(config)), video, latent)
        stream.learn_shapes(video.to("meta"), latent.to("meta"))
    except (TypeError, AttributeError, LookupError, ValueError, RuntimeError, ImportError) as error:
        # errors of an unknown version of diffusers; the caller warns and uses whole clips
        return f"{type(error).__name__}: {error}"
    return stream


def narrow_copy(config: Mapping[str, Any]) -> Any:
    """Copy of the network with few channels and random weights."""
    widths = ("base_dim", "decoder_base_dim") if "decoder_base_dim" in config else ("base_dim",)
    narrow = {**config, **dict.fromkeys(widths, WIDTH)}
    return filled(empty_module("wan", narrow), random_weights(narrow, 0), torch.device("cpu"), torch.float32)


def _compare_with_class(stream: WanStream, video: torch.Tensor, latent: torch.Tensor) -> None:
    """Compares nine frames and three latents of noise: whole through the class, and in two chunks through the stream."""
    stream.learn_shapes(video, latent)
    (head, _), memory = stream.encode(video[:, :, : GROUP + 1], None)
    (tail, _), _ = stream.encode(video[:, :, GROUP + 1 :], memory)
    _compare("latents", torch.cat([head, tail], dim=2), stream.module.encode(video).latent_dist.mode())
    first, memory = stream.decode(latent[:, :, :2], None)
    rest, _ = stream.decode(latent[:, :, 2:], memory)
    _compare("videos", torch.cat([first, rest], dim=2), stream.module.decode(latent).sample)


def _compare(what: str, got: torch.Tensor, want: torch.Tensor) -> None:
    """Raises ValueError unless both are equal up to rounding; a misplaced cache entry gives differences of the size of the values."""
    if got.shape != want.shape:
        raise ValueError(f"{what} of shape {tuple(got.shape)} instead of {tuple(want.shape)}")
    difference, largest = float((got - want).abs().max()), float(want.abs().max())
    if not difference <= 1e-4 * max(1.0, largest):
        raise ValueError(f"{what} differ by {difference:.2e} of {largest:.2e}")
