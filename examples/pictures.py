"""Pictures of a training run: sampled latents decoded to mp4 files and a PNG sheet, and the loss curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor

from examples.training_state import replace_file
from model.sheets import write_sheet
from pipeline import LatentDataset
from pipeline.loader.spec import DatasetSpec
from pipeline.look.showing import LatentDecoder
from pipeline.operate.inspect import file_metadata

SMOOTHED = 25  # steps of the moving mean in the loss curve


class SampleDecoder:
    """Decoder of the latents of a dataset, by the network that made them."""

    def __init__(self, dataset: LatentDataset, device: str) -> None:
        """Raises CheckpointError if the weights are not where the data files say."""
        self._spec = dataset.spec
        metadata = file_metadata(dataset.store, dataset.files.value("key", 0))
        self._decoder = LatentDecoder(metadata["encoder"], None, device)

    def video(self, latent_CTHW: Tensor, *, normalized: bool) -> Tensor:
        """uint8 RGB `3 T H W` of a latent, as loaded with `normalize="model"` or `"none"`."""
        raw_CTHW = denormalised(latent_CTHW.float().cpu(), self._spec) if normalized else latent_CTHW
        return torch.cat(list(self._decoder.decode(raw_CTHW)), dim=1)


def denormalised(latent_CTHW: Tensor, spec: DatasetSpec) -> Tensor:
    """Inverse of the recommended `(z - mean) / std` or `(z - shift) * scale`."""

    def values(constant: float | tuple[float, ...] | None, default: float) -> Tensor:
        return torch.tensor(default if constant is None else constant).reshape(-1, 1, 1, 1)

    if spec.std is not None:
        return latent_CTHW * values(spec.std, 1.0) + values(spec.mean, 0.0)
    return latent_CTHW / values(spec.scale, 1.0) + values(spec.shift, 0.0)


def write_samples(
    folder: Path, samples: Sequence[Tensor], originals: Sequence[Tensor], captions: Sequence[str | None], fps: float
) -> None:
    """`samples.png` (stored videos above, samples of the same captions below) and `samples/N.mp4`. Videos are uint8 RGB `3 T H W`."""
    pairs = list(zip(originals, samples, strict=True))
    titles = [caption or "no caption" for caption in captions]
    replace_file(folder / "samples.png", lambda path: write_sheet(path, pairs, titles, width=1600))
    (folder / "samples").mkdir(exist_ok=True)
    for number, video_3THW in enumerate(samples):
        write_mp4(folder / "samples" / f"{number}.mp4", video_3THW, fps)


def write_mp4(path: Path, video_3THW: Tensor, fps: float) -> None:
    """H.264 of a uint8 RGB video."""
    rate = Fraction(fps).limit_denominator(1001)
    with av.open(str(path), "w", options={"movflags": "faststart"}) as output:
        stream = output.add_stream("libx264", rate=rate, options={"crf": "18"})
        stream.height, stream.width, stream.pix_fmt = *video_3THW.shape[2:], "yuv420p"
        for frame_HW3 in video_3THW.permute(1, 2, 3, 0).cpu().numpy():
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame_HW3), format="rgb24")
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))


def write_loss_curve(path: Path, log: Sequence[Mapping[str, Any]]) -> None:
    """Loss by step, and its mean over the last `SMOOTHED` steps, as PNG."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    steps, losses = [line["step"] for line in log], np.array([line["loss"] for line in log])
    sums = np.cumsum(losses)
    before = np.concatenate([np.zeros(SMOOTHED), sums])[: len(sums)]
    counts = np.minimum(np.arange(1, len(sums) + 1), SMOOTHED)
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(steps, losses, color="0.8", label="each step")
    axes.plot(steps, (sums - before) / counts, label=f"mean of {SMOOTHED} steps")
    axes.set(xlabel="step", ylabel="mean square error of the velocity", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    replace_file(path, lambda partial: figure.savefig(partial, format="png", dpi=120))
    pyplot.close(figure)
