"""Speed of LeanVAE's encoder compared with the plain layer-by-layer implementation, in one run.

    python benchmarks/encode_only.py --network leanvae-dim16 --frames 17 --size 256x256 --repeats 7 --threads 2

Random weights, random pixels. Prints medians over alternating repeats, the ratio, and the largest difference relative to the largest
latent; with `--json` the same as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the pipeline does; libgomp reads it when torch loads

import torch

import model

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file as well as with -m
from benchmarks.plain_networks import PlainNetwork


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Encode speed against a plain PyTorch implementation.")
    parser.add_argument("--network", default="leanvae-dim16", choices=model.names())
    parser.add_argument("--size", default="256x256", help="HEIGHTxWIDTH")
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    return parser.parse_args()


def peak_mb() -> float | None:
    """High-water mark of this process's memory in MB, where the system tells."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    return next(int(line.split()[1]) / 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))


def main() -> None:
    args = options()
    torch.set_num_threads(args.threads)
    height, width = (int(side) for side in args.size.split("x"))
    networks = {dtype: model.load(args.network, untrained=0, dtype=dtype) for dtype in ("float32", "bfloat16")}
    exact = model.load(args.network, untrained=0, dtype="float64")
    plain = PlainNetwork(args.network, exact.config, exact.network.state_dict()).float()

    generator = torch.Generator().manual_seed(0)
    video = torch.rand((1, 3, args.frames, height, width), generator=generator) - 0.5
    planes = torch.randint(16, 236, (1, args.frames, 3, height, width), dtype=torch.uint8, generator=generator)
    runs = {
        "plain float32": lambda: plain(video),
        "lathe float32": lambda: networks["float32"].encode(video)[0].mean,
        "lathe float32 from uint8 YUV": lambda: networks["float32"].encode_planes(planes, ["bt709"])[0].mean,
        "lathe bfloat16": lambda: networks["bfloat16"].encode(video)[0].mean,
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    latents = {name: run() for name, run in runs.items()}  # also warms up
    for _ in range(args.repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)

    # float64 is the judge: two float32 programs differ from each other by both their roundings
    truth = exact.encode(video)[0].mean
    scale = truth.abs().max()
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    rows = []
    for name, median in medians.items():
        same_input = "uint8" not in name
        rows.append(
            {
                "run": name,
                "median_s": median,
                "frames_per_s": args.frames / median,
                "speedup": medians["plain float32"] / median,
                "max_rel_to_plain": float((latents[name] - latents["plain float32"]).abs().max() / scale)
                if same_input
                else None,
                "max_rel_to_float64": float((latents[name] - truth).abs().max() / scale) if same_input else None,
            }
        )
    report = {
        "network": args.network,
        "clip": f"{args.frames}x{args.size}",
        "threads": args.threads,
        "repeats": args.repeats,
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "peak_mb_of_process": peak_mb(),
        "rows": rows,
    }
    print(f"{args.network} {report['clip']}, {args.threads} threads, medians of {args.repeats} interleaved repeats")
    print(f"{'run':<30}{'ms':>8}{'frames/s':>10}{'speedup':>9}{'vs plain':>11}{'vs float64':>12}")
    for row in rows:
        errors = [
            f"{row[key]:.1e}" if row[key] is not None else "-" for key in ("max_rel_to_plain", "max_rel_to_float64")
        ]
        print(
            f"{row['run']:<30}{1e3 * row['median_s']:>8.0f}{row['frames_per_s']:>10.1f}{row['speedup']:>8.2f}x"
            f"{errors[0]:>11}{errors[1]:>12}"
        )
    plain, lathe, _, bfloat16 = rows
    print(f"RESULT {lathe['speedup']:.2f} >= 1.5 {args.network} encode of {report['clip']}, float32, of plain float32")
    print(f"RESULT {lathe['max_rel_to_plain']:.1e} <= 1e-5 its largest difference")
    print(
        f"RESULT {bfloat16['speedup']:.2f} >= 3 {args.network} encode of {report['clip']}, bfloat16, of plain float32"
    )
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    sys.exit(main())
