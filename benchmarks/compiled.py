"""The networks as published, eager and compiled by `torch.compile`, against the prepared form that builds use: encode of one clip, one run.

Random weights and pixels. On a CPU Inductor freezes weights, as an encoder may. What is compared is measured in turn; numbers are medians.
A fast path that is less than `WORTH` times as fast as the compiled definition does not earn its lines.

    python -m benchmarks.compiled [--networks leanvae-dim16] [--clip 17x256x256] [--dtypes float32,bfloat16] [--device cpu]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the pipeline does; libgomp reads it when torch loads

import torch

import model
from benchmarks.machine import Machine
from model.definition import definition

if TYPE_CHECKING:
    from collections.abc import Callable

CLIPS = {"leanvae-dim16": "17x256x256", "wfvae-s": "9x128x128", "ivvae-z4": "9x128x128"}
WORTH = 1.25
REPEATS = 5


def measure(name: str, dtype: str, clip: str, machine: Machine) -> None:
    """Prints a line for each form, and the ratio of the prepared one to the compiled definition."""
    vae = model.load(name, untrained=0, dtype=dtype, device=str(machine.device))
    frames, height, width = (int(part) for part in clip.split("x"))
    low, high = vae.spec.value_range
    video = torch.rand((1, 3, frames, height, width), generator=torch.Generator().manual_seed(0)) * (high - low) + low
    video = video.to(machine.device)
    weights: dict[str, torch.Tensor] = vae.network.state_dict()
    network: Any = definition(name, vae.config, weights)
    network = network.eval().requires_grad_(False).to(machine.device, getattr(torch, dtype))
    rounded = video.to(getattr(torch, dtype))

    def eager() -> torch.Tensor:
        mean: torch.Tensor = network.encode(rounded).mean
        return mean

    compiled = torch.compile(eager, fullgraph=True, dynamic=False)
    forms: dict[str, Callable[[], torch.Tensor]] = {
        "eager": eager,
        "compiled": compiled,
        "prepared": lambda: vae.encode(video)[0].mean,
    }
    with torch.inference_mode():
        began = time.perf_counter()
        compiled()
        compiling = time.perf_counter() - began
        latents = {form: run().float().cpu() for form, run in forms.items()}
        seconds: dict[str, list[float]] = {form: [] for form in forms}
        for _ in range(REPEATS):
            for form, run in forms.items():
                seconds[form].append(machine.clock(run))
    medians = {form: statistics.median(times) for form, times in seconds.items()}
    for form, found in medians.items():
        difference = float((latents[form] - latents["eager"]).abs().max() / latents["eager"].abs().max())
        print(
            f"{name:<16}{clip:<12}{dtype:<10}{form:<10}{1e3 * found:>9.0f} ms{medians['eager'] / found:>7.2f}x{difference:>10.1e}"
        )
    print(f"{name} {dtype}: compiling took {compiling:.0f} s")
    print(
        f"RESULT {medians['compiled'] / medians['prepared']:.2f} >= {WORTH} {name} {clip} {dtype}, prepared, of compiled"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", default=",".join(CLIPS))
    parser.add_argument("--clip", help="frames x height x width [default: by network]")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    import torch._inductor.config as inductor

    machine = Machine(args.device, args.threads)
    inductor.freezing = not machine.cuda
    for name in args.networks.split(","):
        for dtype in args.dtypes.split(","):
            measure(name, dtype, args.clip or CLIPS.get(name, "17x256x256"), machine)


if __name__ == "__main__":
    main()
