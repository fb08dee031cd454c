"""Networks in their forms, encode of one clip in one run: the definition over the whole clip, its steps as builds run them, compiled steps.

Random weights and pixels. On a CPU Inductor packs weights into the steps. Where the device has fused kernels they are a form too, and have
to be `WORTH` times as fast as compiled steps to earn their lines (ADR 27). Forms are measured in turn; numbers are medians.

"Products alone" is the most that any form with the same products can reach: the eager time over the time of the products, at the rate of
the machine's best matrix product.

    python -m benchmarks.compiled [--networks leanvae-dim16] [--clip 17x256x256] [--dtypes float32,bfloat16] [--device cpu]
"""

from __future__ import annotations

import argparse
import os
import statistics
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the pipeline does; libgomp reads it when torch loads

import torch

import model
from benchmarks.machine import Machine
from benchmarks.networks import encode_flop
from benchmarks.plain_networks import PlainNetwork

if TYPE_CHECKING:
    from collections.abc import Callable

CLIPS = {"leanvae-dim16": "17x256x256", "wfvae-s": "9x128x128", "ivvae-z4": "9x128x128"}
# Compiled steps of eager float32 steps on a CPU, by compute dtype.
BARS = {("leanvae-dim16", "float32"): 1.6, ("leanvae-dim16", "bfloat16"): 2.8}
WORTH = 1.15  # on CUDA; the forms for CPUs had to be 1.25 times as fast, and were not
REPEATS = 5


def measure(name: str, dtype: str, clip: str, machine: Machine) -> dict[str, float]:
    """Prints a line for each form, and the ratios that decide which forms are kept. Returns the median seconds of each form."""
    how: dict[str, Any] = {"untrained": 0, "dtype": dtype, "device": str(machine.device)}
    built = {"steps": model.load(name, **how), "compiled steps": model.load(name, **how, compile=True)}
    vae = built["steps"]
    if getattr(vae, "backend", "plain") == "fused":
        built |= {"steps": vae.with_backend("plain"), "fused": vae}
    frames, height, width = (int(part) for part in clip.split("x"))
    low, high = vae.spec.value_range
    video = torch.rand((1, 3, frames, height, width), generator=torch.Generator().manual_seed(0)) * (high - low) + low
    video = video.to(machine.device)
    whole = PlainNetwork(name, vae.config, vae.network.state_dict()).eval().requires_grad_(False)
    whole = whole.to(machine.device, getattr(torch, dtype))
    rounded = video.to(getattr(torch, dtype))

    def encode(network: Any) -> Callable[[], torch.Tensor]:
        return lambda: network.encode(video)[0].mean

    forms: dict[str, Callable[[], torch.Tensor]] = {"whole clip": lambda: whole(rounded)}
    forms |= {form: encode(network) for form, network in built.items()}
    latents = {form: run().float().cpu() for form, run in forms.items()}  # also warms up and compiles
    seconds: dict[str, list[float]] = {form: [] for form in forms}
    for _ in range(REPEATS):
        for form, run in forms.items():
            seconds[form].append(machine.clock(run))
    medians = {form: statistics.median(times) for form, times in seconds.items()}
    for form, found in medians.items():
        difference = float((latents[form] - latents["whole clip"]).abs().max() / latents["whole clip"].abs().max())
        ratio = medians["whole clip"] / found
        print(f"{name:<16}{clip:<12}{dtype:<10}{form:<16}{1e3 * found:>9.0f} ms{ratio:>7.2f}x{difference:>10.1e}")
    print(f"{name} {dtype}: compiling took {built['compiled steps'].compile_s:.0f} s")
    print(f"RESULT {medians['steps'] / medians['compiled steps']:.2f} {name} {clip} {dtype}, compiled steps, of eager")
    flop = encode_flop(name, vae.config, vae.network.state_dict(), clip)
    most = medians["steps"] * machine.matrix_rate(getattr(torch, dtype)) / flop
    print(f"RESULT {most:.2f} {name} {clip} {dtype}, products alone, of eager")
    if "fused" in medians:
        ratio = medians["compiled steps"] / medians["fused"]
        print(f"RESULT {ratio:.2f} >= {WORTH} {name} {clip} {dtype}, fused kernels, of compiled steps")
    return medians


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", default=",".join(CLIPS))
    parser.add_argument("--clip", help="frames x height x width [default: by network]")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    machine = Machine(args.device, args.threads)
    for name in args.networks.split(","):
        clip = args.clip or CLIPS.get(name, "17x256x256")
        found = {dtype: measure(name, dtype, clip, machine) for dtype in args.dtypes.split(",")}
        if machine.cuda or "float32" not in found:
            continue
        for dtype, medians in found.items():
            if bar := BARS.get((name, dtype)):
                ratio = found["float32"]["steps"] / medians["compiled steps"]
                print(f"RESULT {ratio:.2f} >= {bar} {name} {dtype}, compiled steps, of eager float32 steps")


if __name__ == "__main__":
    main()
