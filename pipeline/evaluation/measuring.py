"""Calls of the evaluation into `model/`: measures the chunks of clips and accumulates results. Converts errors of `model/` into Lathe's.

Takes the job, files with weights of LPIPS and I3D, and `FrameChunk`s; returns a `ClipResult` for each clip, and for all a
JSON-ready summary and a picture sheet.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from model.arithmetic import own_arithmetic
from model.metrics.examples import ExampleSelection, FrameSampler
from model.metrics.fidelity import ClipMeter
from model.metrics.frames import SSIM_CONVENTION
from model.metrics.frechet import VideoDistance, WindowFeatures
from model.metrics.i3d import PROTOCOLS, load_i3d
from model.metrics.latents import LatentMoments
from model.metrics.perceptual import BACKBONES, load_lpips
from model.metrics.roundtrip import RoundTrip
from model.metrics.summary import QualitySummary
from model.out_of_memory import is_out_of_memory
from model.sheets import write_sheet
from pipeline.encoder.network import describe_network, load_torch, load_vae
from pipeline.errors import AccessError, CheckpointError, ConfigError, NonFiniteLatent
from pipeline.format.tensors import STORAGE_TYPES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import torch

    from model.interface import LatentSpec
    from model.metrics.fidelity import ClipQuality
    from model.metrics.perceptual import LPIPS
    from pipeline.config import EncodeJob
    from pipeline.records import ClipPlan, FrameChunk, Sample

PIXEL_BITS = 24


@dataclass(frozen=True, slots=True)
class ClipResult:
    """Measurements of one clip."""

    quality: ClipQuality
    latents: LatentMoments
    elements: int  # values in its latent
    features: WindowFeatures | None


class Instruments:
    """Network and metric networks on their device."""

    def __init__(
        self,
        job: EncodeJob,
        device: str,
        dtype: str,
        lpips: Sequence[str] = (),
        i3d: str | None = None,
        fvd: str = "tf",
    ) -> None:
        """`lpips`: one file, or features and linear heads in two. `fvd`: how I3D gets clips, one of `PROTOCOLS`.

        Raises:
            ConfigError: CUDA requested without a CUDA device, more than two LPIPS files, an unknown protocol.
            CheckpointError: no weights, unsafe weights, weights of another network.
            AccessError: the hub refused access or could not be reached.
        """
        if len(lpips) > 2:
            raise ConfigError(f"--lpips: expected one file, or features and heads; got {len(lpips)}")
        if fvd not in PROTOCOLS:
            raise ConfigError(f"--fvd: expected one of {', '.join(PROTOCOLS)}; got {fvd!r}")
        self._torch = load_torch()
        if job.engine.threads is not None:
            self._torch.set_num_threads(job.engine.threads)
        self.vae = load_vae(job.model, device, dtype)
        self.spec: LatentSpec = self.vae.spec
        self.lpips: LPIPS | None = None
        if lpips:
            loaded = _loaded("--lpips", lpips[0], lambda: load_lpips(*lpips, backbones=BACKBONES))
            self.lpips = loaded.to(self.vae.device)
        self.fvd, epsilon = fvd, PROTOCOLS[fvd].norm_epsilon
        self.i3d = _loaded("--i3d", i3d, lambda: load_i3d(i3d, epsilon)).to(self.vae.device) if i3d else None

    def facts(self) -> dict[str, Any]:
        """Description of what was measured, JSON-ready."""
        return {**describe_network(self.vae), "latent": "posterior mean, float32, not rounded to a storage type"}

    def conventions(self) -> dict[str, str | None]:
        """How metrics were computed, as far as papers differ; JSON-ready."""
        lpips = None if self.lpips is None else self.lpips.backbone.label
        return {"ssim": SSIM_CONVENTION, "lpips": lpips}


class ClipMeasurement:
    """Measurement of one clip in progress."""

    def __init__(self, instruments: Instruments, sample: Sample, plan: ClipPlan) -> None:
        self._instruments, self._sample, self._plan = instruments, sample, plan
        spec = instruments.spec
        self._trip = RoundTrip(instruments.vae)
        self._meter = ClipMeter(spec.lead_frames, spec.time_stride, instruments.lpips)
        self._features: WindowFeatures | None = None
        if instruments.i3d is not None:
            self._features = WindowFeatures(instruments.i3d, PROTOCOLS[instruments.fvd])
        self._latents, self._elements, self._sampler = LatentMoments(), 0, FrameSampler()

    def push(self, chunk: FrameChunk) -> None:
        """Adds the next chunk of the clip.

        Raises:
            NonFiniteLatent: the network returned NaN or infinity.
            ConfigError: a chunk does not fit into the device's memory.
        """
        torch = self._instruments._torch
        planes = chunk.planes_T3HW if chunk.planes_T3HW.flags.writeable else chunk.planes_T3HW.copy()
        try:
            step = self._trip.push_planes(torch.from_numpy(planes), chunk.color_matrix, last=chunk.last)
            self._latents.add(step.latent_Cthw)
            self._elements += step.latent_Cthw.numel()
            self._sampler.add(step.original_CTHW, step.reconstruction_CTHW)
            with own_arithmetic(
                self._instruments.vae.device
            ):  # metrics in true float32, as networks: by default cuDNN takes tf32
                self._meter.add(step.original_CTHW, step.reconstruction_CTHW)
                if self._features is not None:
                    self._features.add(step.original_CTHW, step.reconstruction_CTHW)
                    if chunk.last:
                        self._features.finish()
        except FloatingPointError as error:
            message = f"{self._instruments.spec.network}, clip {self._plan.index}: {error}; check the weights and model.compute_dtype"
            raise NonFiniteLatent(message, key=self._sample.key, uri=self._sample.uri) from None
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            frames, _, height, width = planes.shape
            raise ConfigError(
                f"clips.size: {frames} frames of {height}x{width} do not fit into the memory of {self._instruments.vae.device}; "
                "use a smaller size, or a smaller engine.chunk_frames"
            ) from error

    def result(self) -> ClipResult:
        """Measurements of the clip; call after the last chunk."""
        return ClipResult(self._meter.result(), self._latents, self._elements, self._features)

    def pictures(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A few frames of original and reconstruction, uint8 `3 T H W` on the CPU, with sides of at most 384 pixels."""
        return self._sampler.frames()


@dataclass(slots=True)
class _Bucket:
    quality: QualitySummary = field(default_factory=QualitySummary)
    pixels: int = 0
    elements: int = 0


class Findings:
    """Results over all clips. `add` must follow the corpus's order, so that the same corpus gives the same numbers; `show` need not."""

    def __init__(self, storage_dtype: str, fvd: str = "tf") -> None:
        self._bits = 8 * STORAGE_TYPES[storage_dtype].num_bytes
        self._all = _Bucket()
        self._buckets: dict[str, _Bucket] = defaultdict(_Bucket)
        self._latents, self._distance, self._examples = LatentMoments(), VideoDistance(fvd), ExampleSelection()

    @property
    def clips(self) -> int:
        """Number of clips so far."""
        return self._all.quality.clips

    @property
    def mean_psnr(self) -> float:
        """Mean PSNR of the clips so far, in dB."""
        psnr = self._all.quality.summary()["psnr"]
        return float(psnr["mean"]) if psnr else 0.0

    def show(self, number: int, sample: Sample, plan: ClipPlan, run: ClipMeasurement) -> None:
        """Offers a finished clip of sample `number` for the sheet; its frames are kept or dropped at once."""
        psnr = run.result().quality.psnr
        title = f"{psnr:.2f} dB  {sample.key}, clip {plan.index}"
        self._examples.offer(psnr, f"{sample.uri} {number} {plan.index}", title, run.pictures())

    def add(self, plan: ClipPlan, result: ClipResult) -> None:
        """Adds a clip."""
        for bucket in (self._all, self._buckets[str(plan.bucket)]):
            bucket.quality.add(result.quality)
            bucket.pixels += result.quality.frames * plan.bucket.height * plan.bucket.width
            bucket.elements += result.elements
        self._latents.merge(result.latents)
        if result.features is not None:
            self._distance.add(result.features)

    def summary(self) -> dict[str, Any]:
        """JSON-ready; `rfvd` includes the number of windows."""
        return {
            "overall": self._summary_of(self._all),
            "buckets": {name: self._summary_of(self._buckets[name]) for name in sorted(self._buckets)},
            "latents": self._latents.summary(),
            "rfvd": self._distance.summary(),
        }

    def write_sheet(self, path: Path) -> None:
        """Writes the worst, median and best clips as a PNG."""
        chosen = self._examples.chosen()
        pairs = [(example.original_CTHW, example.other_CTHW) for _, example in chosen]
        write_sheet(path, pairs, titles=[f"{label}: {example.title}" for label, example in chosen])

    def _summary_of(self, bucket: _Bucket) -> dict[str, Any]:
        per_pixel = bucket.elements * self._bits / bucket.pixels
        compression = {"bits_per_pixel": per_pixel, "compression_ratio": PIXEL_BITS / per_pixel}
        return {**bucket.quality.summary(), **compression}


def _loaded(flag: str, uri: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except ConnectionError as error:
        raise AccessError(f"{flag} {uri}: {error}") from error
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{flag} {uri}: {error}") from error
