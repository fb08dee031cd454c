"""Every network alone: encode and decode speed, memory, share of the machine's own matrix-product rate, ratio to a plain implementation.

Enters: names of networks, clip sizes, a device (random weights, random pixels; needs torch, and triton on CUDA). Leaves: one table, and the
numbers as JSON with `--json`. What is compared is measured alternately in one run; numbers are medians.

    python benchmarks/networks.py                       # CPU: the cases that fit into --budget seconds each
    python benchmarks/networks.py --device cuda         # GPU: all sizes, best batch
    python benchmarks/networks.py --memory-only         # peak memory of a chunked encode, 17 against 257 frames
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the pipeline does; libgomp reads it when torch loads

import torch
from torch.utils.flop_counter import FlopCounterMode

import model
from model import registry

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file as well as with -m
from benchmarks import plain_networks
from benchmarks.machine import Machine

if TYPE_CHECKING:
    from collections.abc import Callable

NETWORKS = ("leanvae-dim16", "wfvae-s", "wfvae-l", "ivvae-z4", "ivvae-z16")
SIZES = ("17x256x256", "33x256x256", "17x512x512", "17x1080x1920")
# GFLOP of decoding 17x256x256 (two per multiply-add), counted by the networks' authors' code
DECODE_GFLOP = {
    "leanvae-dim4": 288.94,
    "leanvae-dim16": 289.26,
    "wfvae-s-8ch": 5303.7,
    "wfvae-l-16ch": 11440.6,
    "ivvae-z4": 10855.9,
    "ivvae-z16": 10856.5,
}
BATCHES = (1, 2, 4, 8, 16, 32, 64)  # tried on CUDA


@dataclass(frozen=True)
class Row:
    """One line of the table. Times are medians in seconds of one step of `batch` clips."""

    network: str
    clip: str
    direction: str
    dtype: str
    batch: int
    seconds: float
    frames_per_s: float
    peak_mb: float
    tflop_per_s: float | None
    of_matrix_rate: float | None
    of_plain: float | None  # speed against the plain network (same device; `plain_dtype`)
    plain_dtype: str | None
    difference: float | None  # largest, relative to the largest latent of the plain network


def parse_clip(clip: str) -> tuple[int, int, int]:
    frames, height, width = (int(part) for part in clip.split("x"))
    return frames, height, width


def noise(spec: Any, batch: int, clip: str, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    low, high = spec.value_range
    return (low + (high - low) * torch.rand((batch, 3, *parse_clip(clip)), generator=generator)).to(device)


def encode_flop(name: str, config: dict[str, Any], weights: dict[str, torch.Tensor], clip: str) -> float:
    """Counted on the plain network without computing anything."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        plain = plain_networks.build(name, config, {key: value.to("meta") for key, value in weights.items()})
        plain.to("meta")(torch.empty((1, 3, *parse_clip(clip)), device="meta"))
    return float(counter.get_total_flops())


class Case:
    """One network with the same random weights in Lathe's form and in the plain one."""

    def __init__(self, name: str, machine: Machine, dtypes: tuple[str, ...]) -> None:
        self.name, self.machine = registry.resolve(name), machine
        self.config = registry.complete(self.name)
        module = importlib.import_module(registry.family_of(self.name).module)
        self.weights = module.random_weights(self.config, 0)
        self.vaes = {
            dtype: model.from_state_dict(self.name, self.config, self.weights, machine.device, dtype)
            for dtype in dtypes
        }
        # on CUDA the bar is the plain network in bfloat16, eager; on a CPU the plain network in float32
        self.plain_dtype = "bfloat16" if machine.cuda else "float32"
        self.plain = plain_networks.build(self.name, self.config, self.weights)
        self.plain.to(machine.device, getattr(torch, self.plain_dtype))

    def encode_rows(self, clip: str, batch: int, repeats: int) -> list[Row]:
        machine, frames = self.machine, parse_clip(clip)[0]
        video = noise(model.spec(self.name), batch, clip, machine.device)
        plain_video = video.to(getattr(torch, self.plain_dtype))
        runs: dict[str, Callable[[], torch.Tensor]] = {"plain": lambda: self.plain(plain_video)}
        for dtype, vae in self.vaes.items():
            runs[dtype] = lambda vae=vae: vae.encode(video)[0].mean
        latents = {what: run().float().cpu() for what, run in runs.items()}  # warms up, too
        seconds: dict[str, list[float]] = {what: [] for what in runs}
        for _ in range(repeats):
            for what, run in runs.items():
                seconds[what].append(machine.clock(run))
        medians = {what: statistics.median(times) for what, times in seconds.items()}
        flop = encode_flop(self.name, self.config, self.weights, clip) * batch
        rows = []
        for what, median in medians.items():
            dtype = self.plain_dtype if what == "plain" else what
            difference = (latents[what] - latents["plain"]).abs().max() / latents["plain"].abs().max()
            rows.append(
                Row(
                    network=self.name,
                    clip=clip,
                    direction="encode (plain)" if what == "plain" else "encode",
                    dtype=dtype,
                    batch=batch,
                    seconds=median,
                    frames_per_s=batch * frames / median,
                    peak_mb=machine.peak_mb(runs[what]),
                    tflop_per_s=flop / median / 1e12,
                    of_matrix_rate=flop / median / machine.matrix_rate(getattr(torch, dtype)),
                    of_plain=medians["plain"] / median,
                    plain_dtype=self.plain_dtype,
                    difference=float(difference),
                )
            )
        return rows

    def decode_rows(self, clip: str, batch: int, repeats: int) -> list[Row]:
        machine, (frames, height, width) = self.machine, parse_clip(clip)
        rows = []
        for dtype, vae in self.vaes.items():
            spec = vae.spec
            shape = (
                batch,
                spec.latent_channels,
                spec.latent_frames(frames),
                height // spec.space_stride,
                width // spec.space_stride,
            )
            latent = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(machine.device)

            def run(vae: Any = vae, latent: torch.Tensor = latent) -> Any:
                return vae.decode(latent)[0]

            peak = machine.peak_mb(run)
            median = statistics.median(machine.clock(run) for _ in range(repeats))
            known = DECODE_GFLOP.get(self.name) if clip == "17x256x256" else None
            flop = None if known is None else known * 1e9 * batch
            rows.append(
                Row(
                    network=self.name,
                    clip=clip,
                    direction="decode",
                    dtype=dtype,
                    batch=batch,
                    seconds=median,
                    frames_per_s=batch * frames / median,
                    peak_mb=peak,
                    tflop_per_s=None if flop is None else flop / median / 1e12,
                    of_matrix_rate=None if flop is None else flop / median / machine.matrix_rate(getattr(torch, dtype)),
                    of_plain=None,
                    plain_dtype=None,
                    difference=None,
                )
            )
        return rows


def best_batch(case: Case, clip: str) -> int:
    """On CUDA: the batch with the most frames a second; 1 elsewhere."""
    if not case.machine.cuda:
        return 1
    vae, best, fastest = next(iter(case.vaes.values())), 1, 0.0
    for batch in BATCHES:
        try:
            video = noise(vae.spec, batch, clip, case.machine.device)
            vae.encode(video)
            rate = batch / min(case.machine.clock(lambda video=video: vae.encode(video)) for _ in range(2))
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            break
        if rate > fastest:
            best, fastest = batch, rate
    return best


def measure(args: argparse.Namespace) -> list[Row]:
    machine = Machine(args.device, args.threads)
    rows: list[Row] = []
    for name in args.networks.split(","):
        case = Case(name, machine, tuple(args.dtypes.split(",")))
        for clip in args.sizes.split(","):
            flop = encode_flop(case.name, case.config, case.weights, clip)
            expected_s = flop / machine.matrix_rate(torch.float32) * (len(case.vaes) + 1.5) * (args.repeats + 2)
            if expected_s > args.budget:
                print(f"{case.name} {clip}: encode left out, about {expected_s:.0f} s (--budget {args.budget})")
                continue
            try:
                batch = args.batch or best_batch(case, clip)
                rows += show(case.encode_rows(clip, batch, args.repeats), machine)
                decode_s = (
                    DECODE_GFLOP.get(case.name, 1e4) * 1e9 / machine.matrix_rate(torch.float32) * (args.repeats + 1)
                )
                decode_s *= len(case.vaes) * flop / encode_flop(case.name, case.config, case.weights, "17x256x256")
                if decode_s > args.budget:
                    print(f"{case.name} {clip}: decode left out, about {decode_s:.0f} s (--budget {args.budget})")
                    continue
                rows += show(case.decode_rows(clip, max(1, batch // 4), args.repeats), machine)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                print(f"{case.name} {clip}: does not fit into this device's memory")
    return rows


HEADER = (
    f"{'network':<16}{'clip':<14}{'direction':<16}{'dtype':<10}{'batch':>5}{'ms':>9}{'frames/s':>10}{'peak MB':>9}"
    f"{'TFLOP/s':>9}{'of mm':>7}{'x plain':>9}{'difference':>12}"
)


def show(rows: list[Row], machine: Machine) -> list[Row]:
    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    for row in rows:
        print(
            f"{row.network:<16}{row.clip:<14}{row.direction:<16}{row.dtype:<10}{row.batch:>5}{1e3 * row.seconds:>9.0f}"
            f"{row.frames_per_s:>10.1f}{row.peak_mb:>9.0f}{cell(row.tflop_per_s, '.3f'):>9}{cell(row.of_matrix_rate, '.2f'):>7}"
            f"{cell(row.of_plain, '.2f'):>9}{cell(row.difference, '.1e'):>12}",
            flush=True,
        )
    return rows


def chunked_peak_mb(name: str, frames: int, size: str, device: str, threads: int, chunk: int) -> float:
    """Peak memory of this process over an encode in chunks, latents thrown away."""
    machine = Machine(device, threads)
    vae = model.load(name, untrained=0, device=device)
    height, width = (int(side) for side in size.split("x"))

    def encode(count: int) -> None:
        state, done = None, 0
        while done < count:
            take = min(chunk + (vae.spec.lead_frames if done == 0 else 0), count - done)
            posterior, state = vae.encode(noise(vae.spec, 1, f"{take}x{height}x{width}", machine.device), state)
            del posterior
            done += take

    encode(vae.spec.lead_frames + chunk)  # libraries and packed weights
    return machine.whole_peak_mb(lambda: encode(frames))


def memory(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Each length in a process of its own, so that neither inherits the other's heap."""
    results = []
    for name in args.networks.split(","):
        peaks = {}
        for frames in (17, 257):
            command = [sys.executable, __file__, "--device", args.device, "--threads", str(args.threads)]
            command += ["--peak-of", f"{name},{frames},{args.memory_size}"]
            child = subprocess.run(command, capture_output=True, text=True, check=True)
            peaks[frames] = float(child.stdout.split()[-1])
        ratio = peaks[257] / peaks[17]
        print(
            f"{name:<16}{args.memory_size} in chunks of 16: peak {peaks[17]:.0f} MB at 17 frames, {peaks[257]:.0f} MB at 257: {ratio:.3f}"
        )
        results.append({"network": name, "size": args.memory_size, "peak_mb": peaks, "ratio": ratio})
    return results


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Speed and memory of the networks against plain implementations.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--sizes", default=",".join(SIZES), help="FRAMESxHEIGHTxWIDTH, comma-separated")
    parser.add_argument("--dtypes", default=None, help="default: float32,bfloat16; on CUDA bfloat16,float32")
    parser.add_argument("--batch", type=int, help="clips a step; default: 1, on CUDA the fastest")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--budget", type=float, default=150, help="leave out a case expected to take more seconds than this"
    )
    parser.add_argument("--memory-only", action="store_true")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--memory-size", default="128x128")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    args = parser.parse_args()
    args.dtypes = args.dtypes or ("bfloat16,float32" if args.device.startswith("cuda") else "float32,bfloat16")
    return args


def main() -> None:
    args = options()
    if args.peak_of:
        name, frames, size = args.peak_of.split(",")
        print(chunked_peak_mb(name, int(frames), size, args.device, args.threads, chunk=16))
        return
    machine = Machine(args.device, args.threads)
    rates = {dtype: machine.matrix_rate(getattr(torch, dtype)) / 1e12 for dtype in args.dtypes.split(",")}
    told = ", ".join(f"{dtype} {rate:.3f}" for dtype, rate in rates.items())
    print(f"{machine.name}; torch {torch.__version__}; matrix products in TFLOP/s: {told}; medians of {args.repeats}")
    rows: list[Row] = []
    if not args.memory_only:
        print(HEADER)
        rows = measure(args)
    peaks = [] if args.no_memory else memory(args)
    if args.json:
        report = {"machine": machine.name, "torch": torch.__version__, "matrix_tflop_per_s": rates}
        report |= {"rows": [asdict(row) for row in rows], "chunked_memory": peaks}
        args.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    sys.exit(main())
