"""How well a network reconstructs real videos, compared with the best linear autoencoder of as many latent channels.

Takes video files, a network and its weights. Prints PSNR and SSIM per video of the network and of principal components (of blocks of 4x8x8
pixels, 1x8x8 in the first frame) that were fitted on clips of `pipeline.synthetic_videos`; the gain in dB; means over videos; whether
encoding in chunks equals encoding whole clips. Clips are cut, measured and rounded as in `lathe evaluate`.

    python benchmarks/quality.py --videos hiker.mp4 nasa_13013.mp4
    python benchmarks/quality.py --videos clips/ --model leanvae --checkpoint run/weights --size 128x128 --json quality.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the pipeline does; libgomp reads it when torch loads

import torch

import model

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file as well as with -m
from benchmarks.machine import Machine
from model.losslessness import examine
from model.metrics.fidelity import clip_quality
from model.metrics.roundtrip import RoundTrip, eight_bits
from model.training.linear import LinearAutoencoder, fit_linear
from pipeline.config import build_job
from pipeline.corpus import resolve_inputs
from pipeline.engine.decoders.sample_stream import SampleStream
from pipeline.records import FrameChunk, Reject
from pipeline.sample_corpus import make_samples
from pipeline.synthetic_videos.clips import clip as synthetic_clip
from pipeline.video.clips import WHOLE_CLIP, resolve_rules

if TYPE_CHECKING:
    from collections.abc import Iterator

    from model.metrics.fidelity import ClipQuality

# Of the weights that come with Lathe, on their two videos: 17x256x256, 8 frames per second.
BAR_GAIN_DB, BAR_MEAN_DB = 1.5, 32.0


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Quality of a network against principal components.")
    parser.add_argument(
        "--videos", nargs="+", help="files, folders or shards; a row for each video. Without: Lathe's sample corpus"
    )
    parser.add_argument("--model", default="leanvae-mini-dim16", help="the default comes with its weights")
    parser.add_argument("--checkpoint", help="weights; without them those that come with the package")
    parser.add_argument("--untrained", type=int, metavar="SEED", help="random weights, for trials")
    parser.add_argument("--fps", default="8")
    parser.add_argument("--size", default="256x256", help="HEIGHTxWIDTH")
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--clips", default="tile")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="as `lathe encode` takes"
    )
    parser.add_argument("--fit-clips", type=int, default=300, help="synthetic clips of 17x128x128 for the components")
    parser.add_argument("--fit-seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    return parser.parse_args()


def components(vae: Any, clips: int, seed: int) -> LinearAutoencoder:
    """Principal components of synthetic clips, in the network's range and of its number of channels."""
    spec = vae.spec
    if (spec.time_stride, spec.lead_frames) != (4, 1):
        raise SystemExit(
            f"{spec.network} does not code a frame and then groups of four; there is nothing to compare with"
        )
    low, high = spec.value_range
    videos = (synthetic_clip(seed, index, 17, 128, 128)[None] / 255 * (high - low) + low for index in range(clips))
    return fit_linear(videos, spec.latent_channels, side=spec.space_stride)


def chunks(args: argparse.Namespace, spec: Any) -> Iterator[tuple[str, FrameChunk]]:
    """Whole clips of every video with the video's key, as `lathe encode` cuts them."""
    flags = {"inputs": args.videos, "output": ".", "clips.fps": args.fps, "clips.size": args.size}
    flags |= {"clips.frames": str(args.frames), "clips.select": args.clips}
    job = build_job(flags, overrides=tuple(args.set))
    rules = resolve_rules(job.clips, spec.time_stride, spec.space_stride, spec.network, spec.lead_frames)
    with SampleStream(job, resolve_inputs(job.inputs, job.storage), rules, WHOLE_CLIP, args.device) as footage:
        for event in footage:
            if isinstance(event.what, FrameChunk):
                yield event.sample.key, event.what
            elif isinstance(event.what, Reject):
                print(f"  {event.what.key}: {event.what.reason}, {event.what.message}", file=sys.stderr)


def measured(vae: Any, linear: LinearAutoencoder, chunk: FrameChunk) -> tuple[ClipQuality, ClipQuality]:
    """Of the components, of the network; on the same 8-bit original."""
    step = RoundTrip(vae).push_planes(torch.from_numpy(chunk.planes_T3HW), chunk.color_matrix, last=True)
    low, high = vae.spec.value_range
    original = step.original_CTHW.cpu()
    plain = linear.decode(linear.encode(original[None] / 255 * (high - low) + low))
    return (
        clip_quality(original, eight_bits(plain, (low, high))[0]),
        clip_quality(step.original_CTHW, step.reconstruction_CTHW),
    )


def row_of(name: str, pairs: list[tuple[ClipQuality, ClipQuality]]) -> dict[str, Any]:
    """Means over the clips of a video."""
    row: dict[str, Any] = {"video": name, "clips": len(pairs)}
    for label, which in (("pca", 0), ("network", 1)):
        for measure in ("psnr", "psnr_of_mse", "ssim"):
            row[f"{label}_{measure}"] = statistics.fmean(getattr(pair[which], measure) for pair in pairs)
    row["gain_db"] = row["network_psnr"] - row["pca_psnr"]
    return row


def mean_row(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A video counts once, however many clips it gives."""
    names = [name for name in rows[0] if name not in ("video", "clips")]
    means = {name: statistics.fmean(row[name] for row in rows) for name in names}
    return {"video": "mean of videos", "clips": sum(row["clips"] for row in rows), **means}


def show(row: dict[str, Any]) -> None:
    print(
        f"{row['video'][:24]:<26}{row['clips']:>6}{row['pca_psnr']:>10.2f}{row['network_psnr']:>10.2f}{row['gain_db']:>+9.2f}"
        f"{row['network_psnr_of_mse']:>10.2f}{row['pca_ssim']:>10.4f}{row['network_ssim']:>10.4f}",
        flush=True,
    )


def main() -> None:
    args = options()
    with tempfile.TemporaryDirectory() as folder:
        if not args.videos:
            make_samples(folder, seed=0, layout="files")
            args.videos = [folder]
        measure(args)


def measure(args: argparse.Namespace) -> None:
    machine = Machine(args.device, args.threads)
    vae = model.load(args.model, args.checkpoint, device=machine.device, untrained=args.untrained)
    spec = vae.spec
    begun = time.perf_counter()
    linear = components(vae, args.fit_clips, args.fit_seed)
    print(f"{machine.name}; torch {torch.__version__}; {vae!r}")
    print(
        f"{args.frames}x{args.size} at {args.fps} fps, {args.clips}; {spec.latent_channels} components of {args.fit_clips} synthetic "
        f"clips (seed {args.fit_seed}), {time.perf_counter() - begun:.0f} s"
    )
    print(
        f"{'video':<26}{'clips':>6}{'PCA dB':>10}{'net dB':>10}{'gain':>9}{'of MSE':>10}{'PCA SSIM':>10}{'net SSIM':>10}"
    )
    found: dict[str, list[tuple[ClipQuality, ClipQuality]]] = {}
    with torch.inference_mode():
        for key, chunk in chunks(args, spec):
            found.setdefault(key, []).append(measured(vae, linear, chunk))
        findings = list(examine(vae))
    if not found:
        raise SystemExit("no video gave a clip; see the reasons above, or try --size, --frames, --fps")
    rows = [row_of(name, found[name]) for name in sorted(found)]
    for row in rows:
        show(row)
    mean = mean_row(rows)
    show(mean)
    lossless = all(finding.ok for finding in findings)
    worst = max(findings, key=lambda finding: finding.difference)
    print(
        f"gain over PCA {mean['gain_db']:+.2f} dB (bar {BAR_GAIN_DB:+.1f}); mean PSNR {mean['network_psnr']:.2f} dB (bar {BAR_MEAN_DB:.1f} "
        f"with 16 channels, 17x256x256 at 8 fps); lossless: chunked = whole: {'yes' if lossless else 'NO'}, {spec.chunking}, "
        f"largest difference {worst.difference:.1e}"
    )
    print(f"RESULT {mean['gain_db']:.2f} >= {BAR_GAIN_DB} dB over principal components, mean of videos")
    print(f"RESULT {mean['network_psnr']:.2f} >= {BAR_MEAN_DB} dB PSNR, mean of videos")
    if args.json:
        report = {"machine": machine.name, "network": repr(vae), "weights_sha256": vae.weights_sha256, "rows": rows}
        report |= {"mean": mean, "lossless": lossless, "options": {k: str(v) for k, v in vars(args).items()}}
        args.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    sys.exit(main())
