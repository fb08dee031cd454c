"""Causal encoders of diffusers in chunks: LTX-2, EasyAnimate (Magvit) and VidTok, whose own code keeps no state or keeps it on modules.

Takes videos or latents in the module's dtype, on its device, and the state of the previous chunk: tensors with the batch first. The layers
that look back in time get another `forward`, which takes the frames before from the step's `History` and keeps those for the next one. The
history is in a context variable, so modules keep nothing and calls in several threads do not mix.

Steps on a CPU are those of a latent frame (one frame, then groups), so chunking changes no bit. Compared with the class itself, products
over more frames at once may round differently. As the layers are not part of diffusers' interface, each configuration is tested before
use, with noise and a narrow copy, against the class (`open_causal_stream`).
"""

from __future__ import annotations

import json
from contextvars import ContextVar
from functools import cache
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from model.diffusers_vae.clips import Moments, WholeClips, clips_of, split_moments
from model.diffusers_vae.module import empty_module, filled, full_config, random_weights
from model.history import History

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from model.history import StateTensors
    from model.interface import LatentSpec


_STEP: ContextVar[tuple[History, int] | None] = ContextVar("step", default=None)  # its history; number of videos


def _step() -> tuple[History, int]:
    step = _STEP.get()
    if step is None:
        raise RuntimeError("a layer of a causal stream was called outside the stream; call `encode` of the network")
    return step


def _join(frames: torch.Tensor, *, lead: int, keep: int) -> torch.Tensor:
    """`frames` (time is axis 2) after those of the step before, or after `lead` copies of the first; keeps the last `keep`."""
    history, batch = _step()
    past = history.take()
    before = frames[:, :, :1].expand(-1, -1, lead, *frames.shape[3:]) if past is None else past.flatten(0, 1)
    joined = torch.cat([before, frames], dim=2)
    history.keep(joined[:, :, joined.shape[2] - keep :].unflatten(0, (batch, -1)))  # the first axis may hold pixels too
    return joined


# ---- layers: the same results as diffusers' own, with the past from the history --------------------------------------------


def _ltx2_convolution(layer: Any, frames: torch.Tensor, causal: bool = True) -> torch.Tensor:
    size, stride = layer.kernel_size[0], layer.conv.stride[0]
    result: torch.Tensor = layer.conv(_join(frames, lead=size - 1, keep=size - stride))
    return result


def _ltx2_downsampling(layer: Any, frames: torch.Tensor, causal: bool = True) -> torch.Tensor:
    if _step()[0].first:
        frames = torch.cat([frames[:, :, : layer.stride[0] - 1], frames], dim=2)
    mean = _folded(frames, layer.stride).unflatten(1, (-1, layer.group_size)).mean(dim=2)
    return _folded(layer.conv(frames), layer.stride) + mean


def _folded(frames_BCTHW: torch.Tensor, stride: tuple[int, int, int]) -> torch.Tensor:
    """Blocks of `stride` frames, rows and columns moved into the channels."""
    for axis in (4, 3, 2):
        frames_BCTHW = frames_BCTHW.unflatten(axis, (-1, stride[axis - 2]))
    return frames_BCTHW.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)


def _magvit_convolution(layer: Any, frames: torch.Tensor) -> torch.Tensor:
    size = layer.temporal_padding + 1
    joined = _join(frames, lead=size - 1, keep=size - layer.t_stride)
    starts = range(0, joined.shape[2] - size + 1, layer.t_stride)
    return torch.cat([torch.nn.Conv3d.forward(layer, joined[:, :, start : start + size]) for start in starts], dim=2)


def _magvit_upsampling(layer: Any, frames: torch.Tensor) -> torch.Tensor:
    frames = layer.conv(F.interpolate(frames, scale_factor=(1, 2, 2), mode="nearest"))
    if not layer.temporal_upsample or _step()[0].first:
        return frames
    return F.interpolate(frames, scale_factor=(2, 1, 1), mode="nearest" if layer.spatial_group_norm else "trilinear")


def _vidtok_convolution(layer: Any, frames: torch.Tensor) -> torch.Tensor:
    if layer.time_pad:
        frames = _join(frames, lead=layer.time_pad, keep=layer.time_pad)
    if frames.dim() == 5:  # else each pixel by itself, over time
        frames = F.pad(frames, layer.spatial_padding, mode=layer.pad_mode)
    result: torch.Tensor = layer.conv(frames)
    return result


def _vidtok_downsampling(layer: Any, frames: torch.Tensor) -> torch.Tensor:
    alpha = torch.sigmoid(layer.mix_factor)
    joined = _join(frames, lead=1, keep=1)
    half_on_cpu = joined.device.type == "cpu" and joined.dtype == torch.bfloat16  # which torch cannot pool
    pooled = layer.avg_pool(joined.float() if half_on_cpu else joined).to(joined.dtype)
    return alpha * pooled + (1 - alpha) * layer.conv(frames)


LAYERS: dict[str, Callable[..., torch.Tensor]] = {
    "LTX2VideoCausalConv3d": _ltx2_convolution,
    "LTX2VideoDownsampler3d": _ltx2_downsampling,
    "EasyAnimateCausalConv3d": _magvit_convolution,
    "EasyAnimateUpsampler3D": _magvit_upsampling,
    "VidTokCausalConv1d": _vidtok_convolution,
    "VidTokCausalConv3d": _vidtok_convolution,
    "VidTokDownsample3D": _vidtok_downsampling,
}


def _with_history(coder: torch.nn.Module) -> None:
    for layer in coder.modules():
        if forward := LAYERS.get(type(layer).__name__):
            layer.forward = MethodType(forward, layer)


# ---- streams --------------------------------------------------------------------------------------------------------


class CausalStream(WholeClips):
    """Coder that encodes chunks of any number of groups and decodes as `clips` does. Use `open_causal_stream`, which tests it first."""

    def __init__(self, clips: WholeClips, group: int) -> None:
        super().__init__(clips.module, "the decoders published for its class see the frames after, too")
        self.encodes_whole = None
        self._clips, self._group = clips, group
        _with_history(self.module.encoder)

    def encode(self, video_BCTHW: torch.Tensor, memory: StateTensors | None) -> tuple[Moments, StateTensors]:
        """Posterior of the chunk (`group * n` frames, one more without memory), and the state for the next one."""

        def encode(frames: torch.Tensor, *, first: bool) -> torch.Tensor:
            return self._encode_step(frames.contiguous(), first=first)

        parameters, after = _run(encode, self._steps(video_BCTHW, first=memory is None), memory)
        return split_moments(parameters), after

    def decode(self, latent_BCthw: torch.Tensor, memory: StateTensors | None) -> tuple[torch.Tensor, StateTensors]:
        """Video of the clip."""
        return self._clips.decode(latent_BCthw, memory)

    def _steps(self, video_BCTHW: torch.Tensor, *, first: bool) -> list[torch.Tensor]:
        """One step on devices where results are equal up to rounding only."""
        if video_BCTHW.device.type not in ("cpu", "meta"):
            return [video_BCTHW]
        return _by_groups(video_BCTHW, self._group, first=first)

    def _encode_step(self, frames: torch.Tensor, *, first: bool) -> torch.Tensor:
        parameters: torch.Tensor = self.module.encoder(frames)
        return parameters


class VidTokStream(CausalStream):
    """`AutoencoderVidTok`: the first frame stands for a whole group, as in diffusers' `forward`."""

    def _encode_step(self, frames: torch.Tensor, *, first: bool) -> torch.Tensor:
        if first:
            frames = torch.cat([frames[:, :, :1]] * (self._group - 1) + [frames], dim=2)
        return super()._encode_step(frames, first=first)


class MagvitStream(CausalStream):
    """`AutoencoderKLMagvit`: the steps of diffusers itself on every device, because its norms may depend on them; decodes chunks, too."""

    def __init__(self, clips: WholeClips, group: int) -> None:
        super().__init__(clips, group)
        self.decodes_whole = None
        _with_history(self.module.decoder)

    def decode(self, latent_BCthw: torch.Tensor, memory: StateTensors | None) -> tuple[torch.Tensor, StateTensors]:
        """Frames of the chunk (4n-3 for the first n latents, else 4n), and the state for the next one."""

        def decode(latent: torch.Tensor, *, first: bool) -> torch.Tensor:
            video: torch.Tensor = self.module.decoder(self.module.post_quant_conv(latent.contiguous()))
            return video

        return _run(decode, latent_BCthw.split(1, dim=2), memory)

    def _steps(self, video_BCTHW: torch.Tensor, *, first: bool) -> list[torch.Tensor]:
        return _by_groups(video_BCTHW, self._group, first=first)

    def _encode_step(self, frames: torch.Tensor, *, first: bool) -> torch.Tensor:
        parameters: torch.Tensor = self.module.quant_conv(super()._encode_step(frames, first=first))
        return parameters


def _run(
    step: Callable[..., torch.Tensor], pieces: Sequence[torch.Tensor], memory: StateTensors | None
) -> tuple[torch.Tensor, StateTensors]:
    """Results of the steps, joined in time, and the state after the last."""
    results, past = [], memory
    for piece in pieces:
        history = History(past)
        token = _STEP.set((history, piece.shape[0]))
        try:
            results.append(step(piece, first=history.first))
        finally:
            _STEP.reset(token)
        past = history.tensors()
    return torch.cat(results, dim=2), past or ()


def _by_groups(video_BCTHW: torch.Tensor, group: int, *, first: bool) -> list[torch.Tensor]:
    groups = video_BCTHW[:, :, 1:] if first else video_BCTHW
    steps = list(groups.split(group, dim=2)) if groups.shape[2] else []
    return [video_BCTHW[:, :, :1], *steps] if first else steps


STREAMS = {
    "AutoencoderKLLTX2Video": CausalStream,
    "AutoencoderKLMagvit": MagvitStream,
    "AutoencoderVidTok": VidTokStream,
}


# ---- test before use ------------------------------------------------------------------------------------------------


def open_causal_stream(clips: WholeClips, spec: LatentSpec) -> CausalStream | str:
    """Stream around the module of `clips` whose results equal those of its class, or the reason why there is none.

    A process tests each configuration once, on a CPU.
    """
    config = full_config(clips.module)
    reason = _difference(json.dumps(config, sort_keys=True), spec.time_stride, spec.space_stride)
    return reason or STREAMS[config["_class_name"]](clips, spec.time_stride)


@cache
@torch.no_grad()
def _difference(config_json: str, group: int, space_stride: int) -> str:
    """How results for noise differ, whole through the class and in two chunks through the stream; "" if they are equal up to rounding."""
    config = narrow(json.loads(config_json))
    noise = torch.Generator().manual_seed(0)
    shape = (1, 3, 2 * group + 1, 2 * space_stride, 2 * space_stride)
    video = 2 * torch.rand(shape, generator=noise, dtype=torch.float32) - 1
    try:
        weights = random_weights(config, 0)
        module, copy = (
            filled(empty_module("diffusers", config), weights, torch.device("cpu"), torch.float32) for _ in range(2)
        )
        (want, _), _ = clips_of(module, "").encode(video, None)
        stream = STREAMS[config["_class_name"]](clips_of(copy, ""), group)
        (head, _), memory = stream.encode(video[:, :, : group + 1], None)
        stream.encode(video.flip(2)[:, :, : group + 1], None)  # another clip in between, in case a layer keeps frames
        (tail, _), _ = stream.encode(video[:, :, group + 1 :], memory)
        found = compared("latents", torch.cat([head, tail], dim=2), want)
        if found or stream.decodes_whole:
            return found
        video, _ = clips_of(module, "").decode(want, None)
        first, memory = stream.decode(want[:, :, :2], None)
        stream.decode(want.flip(2)[:, :, :2], None)
        rest, _ = stream.decode(want[:, :, 2:], memory)
        return compared("videos", torch.cat([first, rest], dim=2), video)
    except (TypeError, AttributeError, LookupError, ValueError, RuntimeError, ImportError) as error:
        # errors of an unknown version of diffusers; the caller warns and uses whole clips
        return f"{type(error).__name__}: {error}"


def narrow(config: Mapping[str, Any]) -> dict[str, Any]:
    """Configuration of the same layers with few channels."""
    kind = config["_class_name"]
    if kind == "AutoencoderVidTok":
        return {**config, "ch": 8}
    if kind == "AutoencoderKLMagvit":
        widths = config["block_out_channels"]
        return {**config, "block_out_channels": [8 * width // min(widths) for width in widths], "norm_num_groups": 4}
    # LTX-2 folds pixels into channels: all widths must keep their ratios
    widths = ("block_out_channels", "decoder_block_out_channels")
    channels = config["latent_channels"]
    return {
        **config,
        "latent_channels": 8,
        **{key: [8 * width // channels for width in config[key]] for key in widths},
    }


def compared(what: str, got: torch.Tensor, want: torch.Tensor) -> str:
    """How results differ; "" if they are equal up to rounding. A misplaced frame gives differences of the size of the values."""
    if got.shape != want.shape:
        return f"{what} of shape {tuple(got.shape)} instead of {tuple(want.shape)}"
    difference, largest = float((got - want).abs().max()), float(want.abs().max())
    return "" if difference <= 1e-4 * max(1.0, largest) else f"{what} differ by {difference:.2e} of {largest:.2e}"
