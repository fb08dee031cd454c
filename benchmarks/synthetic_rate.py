"""Rate of making synthetic clips, compared with a training step on them.

    python benchmarks/synthetic_rate.py [--sizes 17x128x128,17x256x256,1x256x256] [--clips 12] [--json]
    python benchmarks/synthetic_rate.py --sheet docs/pictures/synthetic-videos.png

One arithmetic thread, as in a loader process; CPU time of this process. `step` is one forward and backward pass of a small LeanVAE (16
channels, widths 32 and 96) on one such clip; `of_step` is the time of making the clip, as a fraction of it. `--sheet` writes the picture of
the documentation instead: nine clips, frames 0, 8 and 16 of each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import av
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file as well as with -m

from benchmarks.machine import Machine
from model.training.networks import trainable
from pipeline.synthetic_videos.clips import clip

if TYPE_CHECKING:
    from collections.abc import Callable

NARROW = {"l_dim": 32, "h_dim": 96, "embedding_dim": 128}
SHOWN = (0, 3, 13, 14, 18, 23, 27, 33, 37)  # clips of film 0 on the sheet


def cpu_s(work: Callable[[int], object], repeats: int) -> list[float]:
    """CPU time of `work(i)` for i in 1..repeats, after one call that is not counted."""
    work(0)
    seconds = []
    for index in range(1, repeats + 1):
        started = time.process_time()
        work(index)
        seconds.append(time.process_time() - started)
    return seconds


def step_s(frames: int, height: int, width: int, repeats: int) -> float:
    """Median CPU time of one training step on one clip."""
    network = trainable("leanvae-dim16", NARROW)
    video_BCTHW = (clip(0, 0, frames, height, width)[None].float() / 255) - 0.5

    def step(_: int) -> None:
        reconstruction = network(video_BCTHW).video_BCTHW
        (reconstruction - video_BCTHW).abs().mean().backward()

    return statistics.median(cpu_s(step, repeats))


def measure(sizes: list[tuple[int, int, int]], clips: int, steps: int) -> list[dict[str, float | str]]:
    """One row per size."""
    rows: list[dict[str, float | str]] = []
    for frames, height, width in sizes:
        seconds = cpu_s(lambda index, size=(frames, height, width): clip(0, index, *size), clips)  # type: ignore[misc]
        row: dict[str, float | str] = {
            "size": f"{frames}x{height}x{width}",
            "clips_per_s": 1 / statistics.mean(seconds),
            "mean_ms": 1e3 * statistics.mean(seconds),
            "worst_ms": 1e3 * max(seconds),
        }
        if steps:
            row["step_ms"] = 1e3 * step_s(frames, height, width, steps)
            row["of_step"] = row["mean_ms"] / row["step_ms"]  # type: ignore[operator]
        rows.append(row)
    return rows


def sheet(path: str, side: int = 96) -> None:
    """Writes frames 0, 8 and 16 of nine clips as one PNG."""
    strips = []
    for index in SHOWN:
        frames = clip(0, index, 17, side, side)[:, ::8].permute(1, 2, 3, 0).numpy()
        strips.append(np.concatenate([*frames, np.full((side, 6, 3), 255, np.uint8)], axis=1))
    rows = [np.concatenate(strips[start : start + 3], axis=1) for start in range(0, len(strips), 3)]
    gap = np.full((6, rows[0].shape[1], 3), 255, np.uint8)
    picture = np.concatenate([part for row in rows for part in (row, gap)])[:-6, :-6]
    with av.open(path, "w", format="image2") as container:
        stream = container.add_stream("png", rate=1)
        stream.height, stream.width, stream.pix_fmt = *picture.shape[:2], "rgb24"
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
        container.mux([*stream.encode(frame), *stream.encode()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes", default="17x128x128,17x256x256,1x256x256", help="frames x height x width, separated by commas"
    )
    parser.add_argument("--clips", type=int, default=12, help="clips per size")
    parser.add_argument("--steps", type=int, default=3, help="training steps per size; 0: none")
    parser.add_argument("--json", action="store_true", help="print numbers as JSON")
    parser.add_argument("--sheet", help="write a picture of nine clips here, measure nothing")
    options = parser.parse_args()
    machine = Machine("cpu", 1)
    if options.sheet:
        sheet(options.sheet)
        return
    sizes = [tuple(int(number) for number in size.split("x")) for size in options.sizes.split(",")]
    rows = measure(sizes, options.clips, options.steps)  # type: ignore[arg-type]
    if options.json:
        print(json.dumps({"machine": machine.name, "rows": rows}))
        return
    print(machine.name)
    for row in rows:
        print(
            "  ".join(
                f"{key} {value:.2f}" if isinstance(value, float) else f"{value:>12}" for key, value in row.items()
            )
        )


if __name__ == "__main__":
    main()
