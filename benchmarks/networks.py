"""Every network alone: encode and decode speed, memory, share of the machine's own matrix-product rate, ratio to the whole clip.

Random weights and random pixels. What is compared is measured alternately in one run; numbers are medians. On CUDA they are those of the
steady state, steps replayed as graphs where a network has them; the peak includes recording the graphs. Ratios are per clip. A batch that
does not fit is halved until it does; the row shows the batch that ran.

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
from collections import deque
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the pipeline does; libgomp reads it when torch loads

import torch
from torch.utils.flop_counter import FlopCounterMode

import model
from model import registry
from model.kernels.graphs import EAGER_RUNS

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file as well as with -m
from benchmarks.machine import Machine
from benchmarks.network_rows import HEADER, Row, results, show
from benchmarks.plain_networks import PlainNetwork

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
class Prepared:
    """A network warm for one video: its encode of `batch` clips, the latents (float32, CPU), the memory it took."""

    run: Callable[[], torch.Tensor]
    batch: int
    latent: torch.Tensor
    peak_mb: float


def extra_calls(machine: Machine) -> int:
    """Warm calls after the first two, until a step is replayed: `EAGER_RUNS` runs as it is, one recording, one replay."""
    return EAGER_RUNS if machine.cuda else 0


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
        plain = PlainNetwork(name, config, {key: value.to("meta") for key, value in weights.items()})
        plain.to("meta")(torch.empty((1, 3, *parse_clip(clip)), device="meta"))
    return float(counter.get_total_flops())


class Case:
    """One network with the same random weights in the steps of builds and as the definition over the whole clip ("plain")."""

    def __init__(self, name: str, machine: Machine, dtypes: tuple[str, ...], *, compile: bool) -> None:
        self.name, self.machine, self.compile = registry.resolve(name), machine, compile
        self.config = registry.complete(self.name)
        module = importlib.import_module(registry.family_of(self.name).module)
        self.weights = module.random_weights(self.config, 0)
        self.dtypes, self.vaes = dtypes, dict[str, Any]()
        # on CUDA the bar is the plain network in bfloat16, eager; on a CPU the plain network in float32
        self.plain_dtype = "bfloat16" if machine.cuda else "float32"
        self.plain = PlainNetwork(self.name, self.config, self.weights)
        self.plain.to(machine.device, getattr(torch, self.plain_dtype))

    def build(self, dtype: str) -> Any:
        return model.from_state_dict(
            self.name, self.config, self.weights, self.machine.device, dtype, compile=self.compile
        )

    def rebuild(self) -> None:
        """On CUDA networks that have run nothing yet: no graph of another shape takes a place or memory."""
        if self.machine.cuda or not self.vaes:
            self.vaes.clear()
            self.vaes = {dtype: self.build(dtype) for dtype in self.dtypes}

    def prepare(self, what: str, video: torch.Tensor) -> Prepared:
        """The network `what` warm for this video, or for as many of its clips as fit."""
        batch = len(video)
        while True:
            try:
                return self._encode(what, video[:batch])  # its own frame, gone once it failed
            except torch.OutOfMemoryError:
                if batch == 1:
                    raise
            torch.cuda.empty_cache()  # out here the traceback is gone, and with it what it held
            print(f"{self.name} {what}: batch {batch} does not fit, {batch // 2} is tried")
            batch //= 2

    def _encode(self, what: str, video: torch.Tensor) -> Prepared:
        def run() -> torch.Tensor:
            return self.plain(video) if what == "plain" else self.vaes[what].encode(video)[0].mean

        latent, peak_mb = self._warm(run)
        return Prepared(run, len(video), latent.float().cpu(), peak_mb)

    def _warm(self, run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, float]:
        """The last result, and the peak after the first call (which compiles, and packs weights)."""
        last = deque([run()], maxlen=1)

        def settle() -> None:
            for _ in range(1 + extra_calls(self.machine)):
                last.append(run())

        peak_mb = self.machine.peak_mb(settle)
        return last.pop(), peak_mb

    def encode_rows(self, clip: str, batch: int, repeats: int) -> list[Row]:
        machine, video = self.machine, noise(model.spec(self.name), batch, clip, self.machine.device)
        videos = dict.fromkeys(self.vaes, video)
        videos["plain"] = video.to(getattr(torch, self.plain_dtype))  # comes last: it has the memory that graphs leave
        ready: dict[str, Prepared] = {}
        for what, given in videos.items():
            try:
                ready[what] = self.prepare(what, given)
            except torch.OutOfMemoryError:
                print(f"{self.name} {clip} {what}: encode left out, one clip does not fit into this device's memory")
        for dtype, vae in self.vaes.items():
            if unrecordable := getattr(getattr(getattr(vae, "fused", None), "graphs", None), "unrecordable", ()):
                print(f"{self.name} {clip} {dtype}: {len(unrecordable)} steps without a graph, for lack of memory")
        seconds: dict[str, list[float]] = {what: [] for what in ready}
        for _ in range(repeats):
            for what, prepared in ready.items():
                if machine.cuda:
                    prepared.run()  # takes the memory back that the one before it had
                seconds[what].append(machine.clock(prepared.run))
        per_clip = {what: statistics.median(times) / ready[what].batch for what, times in seconds.items()}
        flop = encode_flop(self.name, self.config, self.weights, clip)
        plain = ready.get("plain")
        rows = []
        for what, clip_s in sorted(per_clip.items(), key=lambda item: item[0] != "plain"):
            mine, dtype = ready[what], self.plain_dtype if what == "plain" else what
            direction = "encode (plain)" if what == "plain" else "encode"
            row = self.row(clip, direction, dtype, mine.batch, mine.peak_mb, clip_s, flop)
            if plain:
                both = min(mine.batch, plain.batch)
                wanted = plain.latent[:both]
                difference = float((mine.latent[:both] - wanted).abs().max() / wanted.abs().max())
                ratio = per_clip["plain"] / clip_s
                row = replace(row, of_plain=ratio, plain_dtype=self.plain_dtype, difference=difference)
            rows.append(row)
        return rows

    def decode_rows(self, clip: str, batch: int, repeats: int) -> list[Row]:
        frames, height, width = parse_clip(clip)
        known = DECODE_GFLOP.get(self.name) if clip == "17x256x256" else None
        rows = []
        for dtype, vae in self.vaes.items():
            spec = vae.spec
            grid = (spec.latent_frames(frames), height // spec.space_stride, width // spec.space_stride)
            latent = torch.randn((batch, spec.latent_channels, *grid), generator=torch.Generator().manual_seed(1))
            run = partial(lambda vae, latent: vae.decode(latent)[0], vae, latent.to(self.machine.device))
            peak_mb = self._warm(run)[1]
            clip_s = statistics.median(self.machine.clock(run) for _ in range(repeats)) / batch
            rows.append(self.row(clip, "decode", dtype, batch, peak_mb, clip_s, known and known * 1e9))
        return rows

    def row(
        self, clip: str, direction: str, dtype: str, batch: int, peak_mb: float, clip_s: float, flop: float | None
    ) -> Row:
        """`clip_s` and `flop` are one clip's."""
        rate = None if flop is None else flop / clip_s
        return Row(
            network=self.name,
            clip=clip,
            direction=direction,
            dtype=dtype,
            batch=batch,
            seconds=clip_s * batch,
            frames_per_s=parse_clip(clip)[0] / clip_s,
            peak_mb=peak_mb,
            tflop_per_s=None if rate is None else rate / 1e12,
            of_matrix_rate=None if rate is None else rate / self.machine.matrix_rate(getattr(torch, dtype)),
        )


def best_batch(case: Case, clip: str) -> int:
    """On CUDA: the batch with the most frames a second; 1 elsewhere."""
    if not case.machine.cuda:
        return 1
    best, fastest = 1, 0.0
    for batch in BATCHES:
        try:
            rate = steady_rate(case, clip, batch)
        except torch.OutOfMemoryError:
            break
        if rate > fastest:
            best, fastest = batch, rate
    return best


def steady_rate(case: Case, clip: str, batch: int) -> float:
    """Clips a second of a network that has run nothing else, in the first of the dtypes."""
    vae, machine = case.build(case.dtypes[0]), case.machine
    video = noise(vae.spec, batch, clip, machine.device)
    for _ in range(2 + extra_calls(machine)):
        vae.encode(video)
    return batch / min(machine.clock(lambda: vae.encode(video)) for _ in range(2))


def exact_float32(machine: Machine) -> str:
    """Float32 on CUDA means float32, for the plain networks as for Lathe's: torch's own default is tf32 in convolutions."""
    if not machine.cuda:
        return ""
    backends: Any = torch.backends
    backends.cudnn.conv.fp32_precision = backends.cuda.matmul.fp32_precision = "ieee"
    return "; float32 convolutions and matrix products of all networks: ieee"


def measure(args: argparse.Namespace) -> list[Row]:
    machine = Machine(args.device, args.threads)
    rows: list[Row] = []
    for name in args.networks.split(","):
        case = Case(name, machine, tuple(args.dtypes.split(",")), compile=args.compile)
        for clip in args.sizes.split(","):
            flop = encode_flop(case.name, case.config, case.weights, clip)
            expected_s = flop / machine.matrix_rate(torch.float32) * (len(case.dtypes) + 1.5) * (args.repeats + 2)
            if expected_s > args.budget:
                print(f"{case.name} {clip}: encode left out, about {expected_s:.0f} s (--budget {args.budget})")
                continue
            try:
                case.rebuild()
                batch = args.batch or best_batch(case, clip)
                rows += show(case.encode_rows(clip, batch, args.repeats))
                if args.no_decode:
                    continue
                decode_flop = DECODE_GFLOP.get(case.name, 1e4) * 1e9 * flop
                decode_flop /= encode_flop(case.name, case.config, case.weights, "17x256x256")
                decode_s = decode_flop / machine.matrix_rate(torch.float32) * (args.repeats + 1) * len(case.dtypes)
                if decode_s > args.budget:
                    print(f"{case.name} {clip}: decode left out, about {decode_s:.0f} s (--budget {args.budget})")
                    continue
                case.rebuild()
                rows += show(case.decode_rows(clip, max(1, batch // 4), args.repeats))
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                print(f"{case.name} {clip}: does not fit into this device's memory")
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
        print(f"RESULT {ratio:.3f} <= 1.10 peak memory of 257 frames in chunks, of 17 frames, {name}")
        results.append({"network": name, "size": args.memory_size, "peak_mb": peaks, "ratio": ratio})
    return results


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Speed and memory of the networks in steps, against whole clips.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--sizes", default=",".join(SIZES), help="FRAMESxHEIGHTxWIDTH, comma-separated")
    parser.add_argument("--dtypes", default=None, help="default: float32,bfloat16; on CUDA bfloat16,float32")
    parser.add_argument("--compile", action="store_true", help="compiled steps")
    parser.add_argument("--batch", type=int, help="clips a step; default: 1, on CUDA the fastest")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget", type=float, default=150, help="leave out a case expected to take more seconds")
    parser.add_argument("--memory-only", action="store_true")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--no-decode", action="store_true", help="encode only")
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
    float32 = exact_float32(machine)
    rates = {dtype: machine.matrix_rate(getattr(torch, dtype)) / 1e12 for dtype in args.dtypes.split(",")}
    listed = ", ".join(f"{dtype} {rate:.3f}" for dtype, rate in rates.items())
    print(
        f"{machine.name}; torch {torch.__version__}; matrix products in TFLOP/s: {listed}; medians of {args.repeats}{float32}"
    )
    rows: list[Row] = []
    if not args.memory_only:
        print(HEADER)
        rows = measure(args)
        print("\n".join(results(rows)))
    peaks = [] if args.no_memory else memory(args)
    if args.json:
        report = {"machine": machine.name, "torch": torch.__version__, "matrix_tflop_per_s": rates}
        report |= {"rows": [asdict(row) for row in rows], "chunked_memory": peaks}
        args.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    sys.exit(main())
