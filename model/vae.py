"""Base class of all networks: input checks, provenance, states. Families add the arithmetic.

Takes videos (float, or uint8 YUV planes) or latents, with the state of the previous chunk; returns posteriors or videos, and the next
state. A family implements `_run_encoder` and `_run_decoder`; nothing keeps state between calls.
"""

from __future__ import annotations

import dataclasses
import hashlib
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from model import inputs
from model import state as causal
from model.arithmetic import own_arithmetic
from model.colour import check_matrices, yuv_to_video
from model.identity import Identity
from model.posterior import Posterior
from model.registry import family_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from model.checkpoint import CheckpointInfo
    from model.interface import LatentSpec
    from model.state import CausalState
    from model.weights import WeightsSha256


@dataclass(frozen=True, slots=True)
class Pixels:
    """Frames of a batch of videos, read a part at a time: the float video of a whole chunk is never in memory for planes.

    `part(videos, frames)`: these frames of these videos, `B 3 T H W` in the network's range, on its device and in its `input_dtype`.
    """

    batch: int
    frames: int
    size: tuple[int, int]  # height, width
    part: Callable[[slice, slice], torch.Tensor]

    def whole(self) -> torch.Tensor:
        """All frames of all videos."""
        return self.part(slice(None), slice(None))


class CausalVAE:
    """Network ready to run; implements `model.interface.VideoVAE`.

    Attributes:
        spec: LatentSpec. config: published configuration keys. numerics: version of this code's arithmetic.
        sha256: hashes of the weights' values. weights_sha256: that of all tensors.
        checkpoint: CheckpointInfo or None. untrained: True for random weights drawn with `seed`.
        float32_products: "ieee", or "tf32" for trials on CUDA; products in lower precision are not affected.
        device: where it runs. dtype: of the large products. input_dtype: of videos and latents, at least float32.
        compiled: whether steps run through torch.compile, which gives other bits of the same latents.
    """

    numerics: int

    def __init__(
        self,
        spec: LatentSpec,
        config: dict[str, Any],
        sha256: WeightsSha256,
        device: torch.device,
        dtype: torch.dtype,
        checkpoint: CheckpointInfo | None = None,
        seed: int | None = None,
        *,
        compiled: bool = False,
    ) -> None:
        self.spec, self.config, self.sha256, self.weights_sha256 = spec, config, sha256, sha256.all
        device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0", as tensors report it
        self.device, self.dtype, self.input_dtype = device, dtype, torch.promote_types(dtype, torch.float32)
        self.checkpoint, self.seed, self.untrained = checkpoint, seed, seed is not None
        self.float32_products, self.compiled = "ieee", compiled
        settings = hashlib.sha256(repr(sorted(config.items())).encode()).hexdigest()
        self._owner = f"{spec.network} {self.weights_sha256[:12]}/{settings[:6]} {str(dtype).removeprefix('torch.')}"
        self._warned, self._decodes = False, True

    def __repr__(self) -> str:
        origin = f"untrained, seed {self.seed}" if self.untrained else f"weights {self.weights_sha256[:12]}"
        return f"{type(self).__name__}({self.spec.network}, {origin}, {self.dtype} on {self.device})"

    def identity(self) -> Identity:
        """Identity of network and weights, as `model.identify` returns for the same checkpoint, with `spec` for this device."""
        return Identity(self.spec, self.config, self.sha256, self.numerics, self.checkpoint, self.seed, self.compiled)

    @property
    def compile_s(self) -> float:
        """Seconds spent compiling steps so far, with the first run of each. Grows while one compiles; any thread may read it."""
        return 0.0

    @property
    def decode_chunking(self) -> str:
        """`spec.chunking`, for decoding."""
        return self.spec.chunking

    def drop_decoder(self) -> None:
        """Frees the parameters that no latent depends on, most of a LeanVAE. `decode` raises RuntimeError from then on."""
        part = family_of(self.spec.network).latent_part(self.config)
        kept, module = (*part.mean, *part.logvar, *part.shared), self._module()
        for name, parameter in list(module.named_parameters()):
            if not name.startswith(kept):
                owner, _, leaf = name.rpartition(".")
                # Shape and dtype stay: encoders ask the last layer for its dtype, and casts must find every layer.
                with torch.inference_mode(False):  # parameters made in inference mode cannot be cast in place
                    empty = torch.nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
                setattr(module.get_submodule(owner), leaf, empty)
        self._decodes = False

    # ---- entry points -----------------------------------------------------------------------------------------------

    def encode(
        self, video_BCTHW: torch.Tensor, state: CausalState | None = None, *, moments: bool = False
    ) -> tuple[Posterior, CausalState]:
        """Floating-point video `B 3 T H W` in `spec.value_range` -> raw posterior `B d t h w` (float32, or float64), state.

        Without `state`, T follows `spec.frames_rule` (one frame is an image); with it, T is a multiple of `spec.time_stride`.
        `moments=True` adds the log-variance; the bits of the mean do not change.

        Raises:
            ValueError: wrong rank, dtype, frame count or size; a state of another network, batch or size.
        """
        inputs.check_video(video_BCTHW, self.spec, first=state is None)
        if state is None and not self._warned and (message := inputs.range_warning(video_BCTHW, self.spec)):
            self._warned = True
            warnings.warn(message, stacklevel=2)

        def part(videos: slice, frames: slice) -> torch.Tensor:
            return video_BCTHW[videos, :, frames].to(self.device, self.input_dtype, non_blocking=True)

        B, _, T, H, W = video_BCTHW.shape
        return self._encode(Pixels(B, T, (H, W), part), state, moments=moments)

    def encode_planes(
        self,
        planes_BT3HW: torch.Tensor,
        matrices: Sequence[str],
        state: CausalState | None = None,
        *,
        moments: bool = False,
    ) -> tuple[Posterior, CausalState]:
        """`encode` for uint8 YUV 4:4:4 limited-range planes `(B, T, 3, H, W)` with one matrix name per video.

        The planes may be on another device than the network: copying bytes moves a quarter of what floats would.

        Raises:
            ValueError: as `encode`, and for unknown matrices.
        """
        return self._encode(self._pixels_of(planes_BT3HW, matrices, first=state is None), state, moments=moments)

    def encode_condition(
        self, planes_BT3HW: torch.Tensor, matrices: Sequence[str], state: CausalState | None = None
    ) -> tuple[Posterior, CausalState]:
        """`encode_planes` of the first of these frames followed by zeros, as many frames as there are planes; with `state`, of zeros.

        Zero is that of videos in [-1, 1], the middle of any `spec.value_range`: what image-to-video models are trained with.

        Raises:
            ValueError: as `encode_planes`.
        """
        pixels = self._pixels_of(planes_BT3HW, matrices, first=state is None)

        def part(videos: slice, frames: slice) -> torch.Tensor:
            batch, shown = (range(whole)[some] for whole, some in ((pixels.batch, videos), (pixels.frames, frames)))
            shape = (len(batch), 3, len(shown), *pixels.size)
            video = torch.full(shape, sum(self.spec.value_range) / 2, dtype=self.input_dtype, device=self.device)
            if state is None and shown.start == 0:
                video[:, :, :1] = pixels.part(videos, slice(1))
            return video

        return self._encode(dataclasses.replace(pixels, part=part), state, moments=False)

    def _pixels_of(self, planes_BT3HW: torch.Tensor, matrices: Sequence[str], *, first: bool) -> Pixels:
        """Checked planes as pixels, converted a part at a time."""
        inputs.check_planes(planes_BT3HW, self.spec, first=first)
        B, T, _, H, W = planes_BT3HW.shape
        check_matrices(matrices, B)
        planes = planes_BT3HW.to(self.device, non_blocking=True)

        def part(videos: slice, frames: slice) -> torch.Tensor:
            return yuv_to_video(planes[videos, frames], matrices[videos], self.spec.value_range, self.input_dtype)

        return Pixels(B, T, (H, W), part)

    def decode(
        self, latent_BCthw: torch.Tensor, state: CausalState | None = None, *, last: bool = True
    ) -> tuple[torch.Tensor, CausalState]:
        """Raw latents `B d t h w` -> video `B 3 T H W` (float32, or float64; not clamped), state.

        A network that interpolates in time needs the next latent for the last frames of this one: with `last=False` it may hold frames
        back and return them with the next chunk. Over a whole video the frames are those of one call.

        Raises:
            ValueError: wrong rank, dtype or channels; a state of another network, batch or size.
            RuntimeError: after `drop_decoder`.
        """
        if not self._decodes:
            raise RuntimeError(f"{self.spec.network}: its decoder was dropped; load the network again to decode")
        inputs.check_latent(latent_BCthw, self.spec)
        grid = (latent_BCthw.shape[3], latent_BCthw.shape[4])
        self._check_state(state, "decode", latent_BCthw.shape[0], grid)
        with self._arithmetic():
            return self._run_decoder(latent_BCthw, state, last=last)

    def stack_states(self, states: Sequence[CausalState]) -> CausalState:
        """Batches concatenated in order. Raises ValueError for no states, or states of different networks, sizes or phases."""
        return causal.stack(states)

    def split_state(self, state: CausalState, which: Sequence[int] | None = None) -> list[CausalState]:
        """States of batch one that own their memory; `which`: places in the batch [default: all]."""
        return causal.split(state, which)

    # ---- implemented by each family ---------------------------------------------------------------------------------

    def _module(self) -> torch.nn.Module:
        """The loaded module: parameters by published name."""
        raise NotImplementedError

    def _run_encoder(
        self, pixels: Pixels, state: CausalState | None, *, moments: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None, CausalState]:
        """Pixels of valid videos -> mean, log-variance if `moments`, state."""
        raise NotImplementedError

    def _run_decoder(
        self, latent_BCthw: torch.Tensor, state: CausalState | None, *, last: bool
    ) -> tuple[torch.Tensor, CausalState]:
        """Valid latents on any device and of any floating dtype -> video, state."""
        raise NotImplementedError

    # ---- for subclasses ---------------------------------------------------------------------------------------------

    def _encode(self, pixels: Pixels, state: CausalState | None, *, moments: bool) -> tuple[Posterior, CausalState]:
        """Pixels of valid videos -> posterior, state."""
        self._check_state(state, "encode", pixels.batch, self._grid(pixels.size))
        with self._arithmetic():
            mean, logvar, after = self._run_encoder(pixels, state, moments=moments)
        return Posterior(mean, logvar), after

    def _arithmetic(self) -> AbstractContextManager[None]:
        """Context for all computation: no autocast, no gradients, and this network's own precision of float32 products."""
        return own_arithmetic(self.device, self.float32_products)

    def _grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Latent height and width of frames of this size."""
        return size[0] // self.spec.space_stride, size[1] // self.spec.space_stride

    def _check_state(self, state: CausalState | None, kind: str, batch: int, grid: tuple[int, int]) -> None:
        if state is not None:
            causal.check(state, owner=self._owner, kind=kind, batch=batch, grid=grid, device=self.device)

    def _next_state(
        self, kind: str, grid: tuple[int, int], tensors: Sequence[torch.Tensor], phase: str = ""
    ) -> CausalState:
        """State that carries `tensors` to the next chunk."""
        return causal.CausalState(self._owner, kind, grid, tuple(tensors), phase)

    def _ended(self, kind: str, batch: int, grid: tuple[int, int]) -> CausalState:
        """State of a video that cannot be continued."""
        return causal.ended(self._owner, kind, batch, grid, self.device)
