"""The only door to `model/`: chunks of frames in, raw latents and causal states out.

Enters: `FrameChunk`s of equal shape with the state each clip carries. Leaves: numpy latents per chunk, new states. Foreign errors
become ours here: what `model/` raises as ValueError is a checkpoint or configuration error, CUDA's out-of-memory halves the batch and
then the chunk, which changes no value.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

import model
from model.interface import LatentSpec
from model.registry import FAMILIES
from pipeline.errors import AccessError, CheckpointError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from pipeline.config import ModelConfig
    from pipeline.engine.batching import Shape
    from pipeline.records import FrameChunk

__all__ = ["Encoded", "Encoder", "LatentSpec", "Network", "cuda_available", "identify", "known_spec", "resolve_device"]

# Pixel-frames per encode step: on CPU a step of this size runs its matrix products at full rate, more only adds latency;
# a GPU wants far more rows before its matrix units are busy.
STEP_PIXELS_CPU = 17 * 256 * 256
STEP_PIXELS_CUDA = 64 * 17 * 256 * 256


def known_spec(config: ModelConfig) -> LatentSpec | None:
    """The latent specification as far as name and configuration tell it (loads no torch); None if only the checkpoint can.

    Raises:
        ConfigError: unknown network; names those that are known.
    """
    if config.name not in model.names() and config.name in FAMILIES and config.config is None:
        return None
    try:
        return model.spec(config.name, config.config)
    except ValueError as error:
        raise ConfigError(f"model: {error}") from None


def resolve_device(device: str, compute_dtype: str, *, cuda: bool) -> tuple[str, str]:
    """`auto` made definite, given whether the encoders will have CUDA: (device, compute dtype)."""
    device = ("cuda" if cuda else "cpu") if device == "auto" else device
    dtype = ("bfloat16" if device.startswith("cuda") else "float32") if compute_dtype == "auto" else compute_dtype
    return device, dtype


def cuda_available() -> bool:
    """Whether this process sees a CUDA device."""
    return bool(_torch().cuda.is_available())


def _torch() -> Any:
    """Torch, told before it loads that idle arithmetic threads sleep instead of spinning.

    Decoders share the cores with a CPU encoder; spinning threads made an encode step up to five times slower beside one busy process.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    return torch


def identify(config: ModelConfig) -> Network:
    """The network a job would use, found by loading it once on CPU: bad checkpoints show before workers start.

    Raises:
        CheckpointError: no weights, unsafe weights, weights of another network.
    """
    return Encoder(config, "cpu", "float32").network()


@dataclass(frozen=True, slots=True)
class Network:
    """Which network it is. `identity` goes into the fingerprint, `provenance` (where the file came from) only into metadata."""

    spec: LatentSpec
    identity: dict[str, Any]
    provenance: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Encoded:
    """Result of one chunk: float32 `CTHW` on the latent grid, and what the clip's next chunk needs."""

    mean_Cthw: np.ndarray
    logvar_Cthw: np.ndarray | None
    state: Any


class Encoder:
    """A network on its device. `threads`: arithmetic threads (None: torch's choice); `batch`: most chunks a step (None: by size)."""

    def __init__(
        self,
        config: ModelConfig,
        device: str,
        compute_dtype: str,
        *,
        moments: bool = False,
        threads: int | None = None,
        batch: int | None = None,
    ) -> None:
        torch = _torch()
        if threads is not None:
            torch.set_num_threads(threads)
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise ConfigError(
                f"model.device: {device} was asked for, but this process sees no CUDA device; use cpu or auto"
            )
        try:
            self._vae = model.load(
                config.name,
                config.checkpoint,
                config=config.config,
                device=device,
                dtype=getattr(torch, compute_dtype),
                untrained=config.untrained,
            )
        except (ValueError, FileNotFoundError) as error:
            raise CheckpointError(f"model: {error}") from error
        except RuntimeError as error:
            if not (config.checkpoint or "").startswith("hf://"):
                raise
            raise AccessError(f"model.checkpoint: {error}") from error
        self._torch = torch
        self._device = torch.device(device)
        self._moments = moments
        self._batch = batch
        self._largest: dict[tuple[int, int, int], int] = {}  # batch sizes learnt from running out of memory
        self.spec: LatentSpec = self._vae.spec

    def network(self) -> Network:
        """What the weights and the arithmetic are, JSON-ready."""
        vae = self._vae
        identity = {
            "network": self.spec.network,
            "config": dict(vae.config),
            "weights_sha256": vae.weights_sha256,
            "untrained": vae.untrained,
            "numerics": vae.numerics,
        }
        return Network(
            self.spec, identity, vae.checkpoint.to_dict() if vae.checkpoint else {"untrained_seed": vae.seed}
        )

    def largest_batch(self, shape: Shape) -> int:
        """Chunks of this shape per step."""
        _, frames, height, width = shape
        pixels = STEP_PIXELS_CUDA if self._device.type == "cuda" else STEP_PIXELS_CPU
        most = self._batch or max(1, pixels // (frames * height * width))
        return min(most, self._largest.get((frames, height, width), most))

    def encode(self, chunks: Sequence[FrameChunk], states: Sequence[Any]) -> list[Encoded]:
        """One step: `chunks` are alike in shape, `states` (None for first chunks) belong to them in order."""
        try:
            return self._step(chunks, states)
        except self._torch.OutOfMemoryError:
            frames, _, height, width = chunks[0].planes_T3HW.shape
            if len(chunks) > 1:
                half = len(chunks) // 2
                self._largest[frames, height, width] = half
                self._release_memory()
                return self.encode(chunks[:half], states[:half]) + self.encode(chunks[half:], states[half:])
            self._release_memory()
            return [self._encode_in_parts(chunks[0], states[0])]

    def _encode_in_parts(self, chunk: FrameChunk, state: Any) -> Encoded:
        """One chunk that is too large, in two along time, on a group boundary: the same latents from less memory."""
        stride = self.spec.time_stride
        frames = chunk.planes_T3HW.shape[0]
        groups = (frames - chunk.first) // stride
        if groups < 1 + (not chunk.first) or self.spec.chunking == "none":
            raise ConfigError(
                f"clips.size: {chunk.planes_T3HW.shape[2]}x{chunk.planes_T3HW.shape[3]} does not fit into the device's memory even "
                f"as {frames} frames alone; use a smaller size"
            )
        cut = int(chunk.first) + groups // 2 * stride
        planes, times = chunk.planes_T3HW, chunk.pts_s
        kind = type(chunk)
        head = kind(chunk.clip, planes[:cut], times[:cut], chunk.color_matrix, chunk.first, last=False)
        tail = kind(chunk.clip, planes[cut:], times[cut:], chunk.color_matrix, first=False, last=chunk.last)
        a = self.encode([head], [state])[0]
        b = self.encode([tail], [a.state])[0]
        logvar = None
        if a.logvar_Cthw is not None and b.logvar_Cthw is not None:
            logvar = np.concatenate([a.logvar_Cthw, b.logvar_Cthw], axis=1)
        return Encoded(np.concatenate([a.mean_Cthw, b.mean_Cthw], axis=1), logvar, b.state)

    def _step(self, chunks: Sequence[FrameChunk], states: Sequence[Any]) -> list[Encoded]:
        torch = self._torch
        planes_BT3HW = torch.from_numpy(_stack(chunks))
        if self._device.type == "cuda":
            planes_BT3HW = planes_BT3HW.pin_memory().to(self._device, non_blocking=True)
        carried = None if states[0] is None else self._vae.stack_states(list(states))
        matrices = [chunk.color_matrix for chunk in chunks]
        with torch.inference_mode():
            posterior, after = self._vae.encode_planes(planes_BT3HW, matrices, carried, moments=self._moments)
        # A last chunk's state has no use; keeping it would hold device memory until the clip is written.
        parts = self._vae.split_state(after)
        mean = _to_numpy(posterior.mean)
        logvar = _to_numpy(posterior.logvar) if posterior.logvar is not None else None
        return [
            Encoded(mean[i], None if logvar is None else logvar[i], None if chunk.last else parts[i])
            for i, chunk in enumerate(chunks)
        ]

    def _release_memory(self) -> None:
        if self._device.type == "cuda":
            self._torch.cuda.empty_cache()


def _stack(chunks: Sequence[FrameChunk]) -> np.ndarray:
    if len(chunks) > 1:
        return np.stack([chunk.planes_T3HW for chunk in chunks])
    planes_T3HW = chunks[0].planes_T3HW
    # Arrays out of Ray's object store are read-only, which torch warns about; one chunk is cheap to copy.
    return (planes_T3HW if planes_T3HW.flags.writeable else planes_T3HW.copy())[None]


def _to_numpy(tensor: torch.Tensor) -> np.ndarray:
    array: np.ndarray = tensor.float().cpu().numpy()
    return array
