"""WF-VAE: 4x8x8 or 8x8x8, causal, residual blocks beside an energy-flow path of Haar low bands.

Enters: published weights and configuration; videos `B 3 T H W` in [-1, 1] (first chunk 4n+1 frames, later ones 4n; 8 for 8x8x8) or
latents. Leaves: raw posterior means `B d t H/8 W/8`, videos, and the causal state for the next chunk.

On a CPU every step is one group of frames (one latent) of one video, the first frame by itself, so that the shapes that reach the
libraries depend on the frame size only: any chunks and any batch give the same bits, and memory is flat. On other devices a step is the
whole batch and chunk, the first frame still by itself (kernels summed over time do a third of the work there).
"""

from __future__ import annotations

from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from model import inputs
from model.vae import CausalVAE
from model.weights import check_weights, fill
from model.wfvae.decoder import prepare_decoder
from model.wfvae.encoder import prepare_encoder
from model.wfvae.memory import Memory, owned
from model.wfvae.parameters import empty_network, random_weights, with_filters

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import nn

    from model.interface import LatentSpec
    from model.state import CausalState
    from model.weights import CheckedWeights, WeightsSha256
    from model.wfvae.decoder import Decoder
    from model.wfvae.encoder import Encoder


__all__ = ["NUMERICS", "WFVAE", "StreamedVAE", "build", "check", "random_weights"]

NUMERICS = 1  # raise whenever the same weights and frames would give other bits; part of every build's fingerprint

LOGVAR_RANGE = (-30.0, 20.0)
BEGUN = "after the first latent"  # a decoder that interpolates in time holds no frame back yet


class StreamedVAE(CausalVAE):
    """Steps through videos; the families of WF-VAE give the encoder and the decoder.

    Attributes, besides those of `CausalVAE`:
        network: parameters under their published names.
    """

    numerics = NUMERICS
    _encoder: Any
    _decoder: Any

    def __init__(self, network: nn.Module, *arguments: Any, **provenance: Any) -> None:
        super().__init__(*arguments, **provenance)
        self.network: Any = network

    def coefficients(self, video_BCTHW: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The Haar bands `B C t h w` that the energy flow reads, of a whole video, from the finest level on (spec section 4)."""
        inputs.check_video(video_BCTHW, self.spec, first=True)
        with self._arithmetic():
            return self._encoder.coefficients(video_BCTHW.to(self.device, self.input_dtype))

    def decoded_coefficients(self, latent_BCthw: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The bands `B C t h w` that the decoder predicts, additions included, of a whole video, from the finest level on."""
        inputs.check_latent(latent_BCthw, self.spec)
        bands: list[torch.Tensor] = []
        latent = latent_BCthw.to(self.device, self.input_dtype).permute(0, 2, 3, 4, 1).contiguous()
        with self._arithmetic():
            self._decoder(latent, Memory(None, self._decoder.slots), bands)
        return tuple(found.permute(0, 4, 1, 2, 3).contiguous() for found in bands)

    # ---- directions -------------------------------------------------------------------------------------------------

    def _run_encoder(
        self, video_BCTHW: torch.Tensor, state: CausalState | None, *, moments: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None, CausalState]:
        self._check_whole(state is None, "encode")
        encoder, B = self._encoder, video_BCTHW.shape[0]
        heads = [encoder.heads.mean, encoder.heads.logvar][: 1 + moments]
        steps = self._steps(inputs.check_frames(video_BCTHW.shape[2], self.spec, first=state is None), state is None)
        starts = [self._first_frame(start, state is None) for start, _ in steps]
        cuts = [*starts, video_BCTHW.shape[2]]

        def step(videos: slice, number: int, memory: Memory) -> list[torch.Tensor]:
            frames = video_BCTHW[videos, :, cuts[number] : cuts[number + 1]].to(self.device, self.input_dtype)
            return encoder(frames, memory, heads)

        (mean, *rest), tensors = self._stream(B, len(steps), state, encoder.slots, step, last=True)
        after = self._remember("encode", self._grid_of(video_BCTHW), tensors)
        return mean, rest[0].clamp_(*LOGVAR_RANGE) if moments else None, after

    def _run_decoder(
        self, latent_BCthw: torch.Tensor, state: CausalState | None, *, last: bool
    ) -> tuple[torch.Tensor, CausalState]:
        self._check_whole(state is None and last, "decode")
        decoder, (B, _, rows, h, w) = self._decoder, latent_BCthw.shape
        steps = self._steps(rows, state is None)

        def step(videos: slice, number: int, memory: Memory) -> list[torch.Tensor]:
            latent = latent_BCthw[videos, :, slice(*steps[number])].to(self.device, self.input_dtype)
            return [decoder(latent.permute(0, 2, 3, 4, 1).contiguous(), memory).permute(0, 2, 3, 4, 1)]

        (video,), tensors = self._stream(B, len(steps), state, decoder.slots, step, last=last)
        if last:
            return video, self._ended("decode", B, (h, w))
        return video, self._remember("decode", (h, w), tensors, BEGUN if state is None and rows == 1 else "")

    # ---- stepping ---------------------------------------------------------------------------------------------------

    def _stream(
        self,
        batch: int,
        steps: int,
        state: CausalState | None,
        slots: int,
        step: Callable[[slice, int, Memory], list[torch.Tensor]],
        *,
        last: bool,
    ) -> tuple[list[torch.Tensor], tuple[torch.Tensor, ...]]:
        """Runs `step(videos, number, memory)` over all videos and steps -> its outputs as `B C T H W`, the next state's tensors."""
        rows, memories = [], []
        for videos in self._videos(batch):
            past = None if state is None else tuple(tensor[videos] for tensor in state.tensors)
            pieces = []
            for number in range(steps):
                memory = Memory(past, slots, last=last and number + 1 == steps)
                pieces.append(step(videos, number, memory))
                past = memory.kept()
            rows.append([_joined(parts, 1) for parts in zip(*pieces, strict=True)])
            memories.append(past or ())
        outputs = [_joined(parts, 0).permute(0, 4, 1, 2, 3).contiguous() for parts in zip(*rows, strict=True)]
        return outputs, tuple(owned(_joined(parts, 0)) for parts in zip(*memories, strict=True))

    def _videos(self, batch: int) -> Iterator[slice]:
        size = 1 if self.device.type == "cpu" else batch
        yield from (slice(start, start + size) for start in range(0, batch, size))

    def _steps(self, rows: int, first: bool) -> list[tuple[int, int]]:
        """Latent rows of each step; the first row of a video by itself, unless only whole clips make sense."""
        if self.spec.chunking == "none":
            return [(0, rows)]
        if self.device.type == "cpu":
            return [(row, row + 1) for row in range(rows)]
        cuts = sorted({0, int(first), rows})
        return list(pairwise(cuts))

    def _first_frame(self, row: int, first: bool) -> int:
        """Frame of the chunk at which a latent row begins."""
        stride = self.spec.time_stride
        return stride * row - (stride - 1) * first if row else 0

    def _check_whole(self, whole: bool, kind: str) -> None:
        if self.spec.chunking == "none" and not whole:
            raise ValueError(
                f"{self.spec.network} cannot {kind} in chunks: {self._why_whole()}, so every latent depends on every frame. "
                f"Give whole clips in one call, with no state" + (" and last=True" if kind == "decode" else "")
            )

    def _why_whole(self) -> str:
        if self.config["norm_type"] == "groupnorm":
            return "norm_type 'groupnorm' takes its statistics over all frames of the clip"
        return "its attention, 'AttnBlock3D', mixes the frames of the clip"


def _joined(parts: Sequence[torch.Tensor], axis: int) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=axis)


class WFVAE(StreamedVAE):
    """WF-VAE ready to run; see `model.interface.VideoVAE` for the contract.

    On a CPU latents and videos are bit for bit the same under any chunking and any batch; on other devices to rounding
    (`spec.chunking` says which). `decode(last=False)` holds back the frames that need the next latent.
    """

    @cached_property
    def _encoder(self) -> Encoder:
        return prepare_encoder(self.network.encoder, self.network.state_dict(), self.config, self.device, self.dtype)

    @cached_property
    def _decoder(self) -> Decoder:
        return prepare_decoder(self.network.decoder, self.network.state_dict(), self.config, self.device, self.dtype)


def check(spec: LatentSpec, config: dict[str, Any], weights: Mapping[str, torch.Tensor]) -> CheckedWeights:
    """Weights compared with their network, which is not built.

    Raises:
        ValueError: keys or shapes that are not this configuration's, or non-finite weights.
    """
    network = empty_network(config)
    return check_weights(network, spec, config, with_filters(network.state_dict(), weights))


def build(
    checked: CheckedWeights, sha256: WeightsSha256, device: torch.device, dtype: torch.dtype, **provenance: Any
) -> WFVAE:
    """The VAE of these weights; `provenance`: `checkpoint` or `seed`."""
    spec = checked.spec.on_device(device.type)
    return WFVAE(fill(checked), spec, checked.config, sha256, device, dtype, **provenance)
