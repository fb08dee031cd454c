"""WF-VAE ready to run: splits chunks into steps and passes the causal state on.

Takes videos `B 3 T H W` in [-1, 1] (first chunk 4n+1 frames, later ones 4n; 8 for 8x8x8) or latents; returns raw posterior means
`B d t H/8 W/8` or videos, and the state for the next chunk.

On a CPU every step is one group of frames (one latent) of one video, and the first frame is a step of its own. The shapes passed to the
libraries then depend on the frame size only: any chunks and any batch give the same bits, and memory is constant. On other devices a step
is the whole batch and chunk, except that the first frame is still a step of its own (kernels summed over time do a third of the
work there).
"""

from __future__ import annotations

from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from model import inputs
from model.posterior import LOGVAR_RANGE
from model.vae import CausalVAE
from model.weights import check_weights, fill
from model.wfvae.fast.decoder import prepare_decoder
from model.wfvae.fast.encoder import prepare_encoder
from model.wfvae.fast.stream_state import StreamState, own_memory
from model.wfvae.network import empty_network
from model.wfvae.random_weights import random_weights, with_filters

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import nn

    from model.interface import LatentSpec
    from model.state import CausalState
    from model.vae import Pixels
    from model.weights import CheckedWeights, WeightsSha256
    from model.wfvae.fast.decoder import Decoder
    from model.wfvae.fast.encoder import Encoder


__all__ = ["NUMERICS", "WFVAE", "StreamedVAE", "build", "check", "random_weights"]

NUMERICS = 1  # increase when the same weights and frames give other bits; part of every build's fingerprint

FIRST_LATENT_ONLY = "after the first latent"  # phase of a decoder that interpolates in time and holds no frame back yet


class StreamedVAE(CausalVAE):
    """Base of the WF-VAE families, which provide the encoder and the decoder; runs them step by step.

    Attributes, besides those of `CausalVAE`:
        network: parameters under their published names.
    """

    numerics = NUMERICS
    _encoder: Any
    _decoder: Any

    def __init__(self, network: nn.Module, *arguments: Any, **provenance: Any) -> None:
        super().__init__(*arguments, **provenance)
        self.network: Any = network

    # ---- encoder and decoder ----------------------------------------------------------------------------------------

    def _run_encoder(
        self, pixels: Pixels, state: CausalState | None, *, moments: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None, CausalState]:
        video_BCTHW = pixels.whole()
        self._check_whole(state is None, "encode")
        encoder, B = self._encoder, video_BCTHW.shape[0]
        heads = [encoder.heads.mean, encoder.heads.logvar][: 1 + moments]
        steps = self._steps(inputs.check_frames(video_BCTHW.shape[2], self.spec, first=state is None), state is None)
        starts = [self._first_frame(start, state is None) for start, _ in steps]
        cuts = [*starts, video_BCTHW.shape[2]]

        def step(videos: slice, number: int, stream: StreamState) -> list[torch.Tensor]:
            frames = video_BCTHW[videos, :, cuts[number] : cuts[number + 1]].to(self.device, self.input_dtype)
            return encoder(frames, stream, heads)

        (mean, *rest), tensors = self._stream(B, len(steps), state, encoder.slots, step, last=True)
        after = self._next_state("encode", self._grid(pixels.size), tensors)
        return mean, rest[0].clamp_(*LOGVAR_RANGE) if moments else None, after

    def _run_decoder(
        self, latent_BCthw: torch.Tensor, state: CausalState | None, *, last: bool
    ) -> tuple[torch.Tensor, CausalState]:
        self._check_whole(state is None and last, "decode")
        decoder, (B, _, rows, h, w) = self._decoder, latent_BCthw.shape
        steps = self._steps(rows, state is None)

        def step(videos: slice, number: int, stream: StreamState) -> list[torch.Tensor]:
            latent = latent_BCthw[videos, :, slice(*steps[number])].to(self.device, self.input_dtype)
            return [decoder(latent.permute(0, 2, 3, 4, 1).contiguous(), stream).permute(0, 2, 3, 4, 1)]

        (video,), tensors = self._stream(B, len(steps), state, decoder.slots, step, last=last)
        if last:
            return video, self._ended("decode", B, (h, w))
        return video, self._next_state(
            "decode", (h, w), tensors, FIRST_LATENT_ONLY if state is None and rows == 1 else ""
        )

    # ---- stepping ---------------------------------------------------------------------------------------------------

    def _stream(
        self,
        batch: int,
        steps: int,
        state: CausalState | None,
        slots: int,
        step: Callable[[slice, int, StreamState], list[torch.Tensor]],
        *,
        last: bool,
    ) -> tuple[list[torch.Tensor], tuple[torch.Tensor, ...]]:
        """Calls `step(videos, number, stream)` for all videos and steps. Returns outputs as `B C T H W` and the next state's tensors."""
        rows, states = [], []
        for videos in self._videos(batch):
            past = None if state is None else tuple(tensor[videos] for tensor in state.tensors)
            pieces = []
            for number in range(steps):
                stream = StreamState(past, slots, last=last and number + 1 == steps)
                pieces.append(step(videos, number, stream))
                past = stream.next_tensors()
            rows.append([_joined(parts, 1) for parts in zip(*pieces, strict=True)])
            states.append(past or ())
        outputs = [_joined(parts, 0).permute(0, 4, 1, 2, 3).contiguous() for parts in zip(*rows, strict=True)]
        return outputs, tuple(own_memory(_joined(parts, 0)) for parts in zip(*states, strict=True))

    def _videos(self, batch: int) -> Iterator[slice]:
        size = 1 if self.device.type == "cpu" else batch
        yield from (slice(start, start + size) for start in range(0, batch, size))

    def _steps(self, rows: int, first: bool) -> list[tuple[int, int]]:
        """Latent rows (start, stop) of each step; a video's first row is a step of its own, unless whole clips are required."""
        if self.spec.chunking == "none":
            return [(0, rows)]
        if self.device.type == "cpu":
            return [(row, row + 1) for row in range(rows)]
        cuts = sorted({0, int(first), rows})
        return list(pairwise(cuts))

    def _first_frame(self, row: int, first: bool) -> int:
        """Index, in the chunk, of the first frame of a latent row."""
        stride = self.spec.time_stride
        return stride * row - (stride - 1) * first if row else 0

    def _check_whole(self, whole: bool, kind: str) -> None:
        if self.spec.chunking == "none" and not whole:
            raise ValueError(
                f"{self.spec.network} cannot {kind} in chunks: {self._why_whole()}, so every latent depends on every frame. "
                f"Pass whole clips in one call, without state" + (" and with last=True" if kind == "decode" else "")
            )

    def _why_whole(self) -> str:
        if self.config["norm_type"] == "groupnorm":
            return "norm_type 'groupnorm' takes its statistics over all frames of the clip"
        return "its attention, 'AttnBlock3D', mixes the frames of the clip"


def _joined(parts: Sequence[torch.Tensor], axis: int) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=axis)


class WFVAE(StreamedVAE):
    """WF-VAE ready to run; implements `model.interface.VideoVAE`.

    On a CPU latents and videos have the same bits for any chunking and any batch; on other devices they are equal up to rounding
    (`spec.chunking` says which). `decode(last=False)` holds back the frames that need the next latent.
    """

    @cached_property
    def _encoder(self) -> Encoder:
        return prepare_encoder(self.network.encoder, self.network.state_dict(), self.config, self.device, self.dtype)

    @cached_property
    def _decoder(self) -> Decoder:
        return prepare_decoder(self.network.decoder, self.network.state_dict(), self.config, self.device, self.dtype)


def check(spec: LatentSpec, config: dict[str, Any], weights: Mapping[str, torch.Tensor]) -> CheckedWeights:
    """Compares weights with the network of this configuration, without building it.

    Raises:
        ValueError: keys or shapes of another configuration, or non-finite weights.
    """
    network = empty_network(config)
    return check_weights(network, spec, config, with_filters(network.state_dict(), weights))


def build(
    checked: CheckedWeights, sha256: WeightsSha256, device: torch.device, dtype: torch.dtype, **provenance: Any
) -> WFVAE:
    """Network with these weights; `provenance`: `checkpoint` or `seed`."""
    spec = checked.spec.on_device(device.type)
    return WFVAE(fill(checked), spec, checked.config, sha256, device, dtype, **provenance)
