"""Errors of float32, tf32 (CUDA), bfloat16 and float16 compared with float64, for latents and for decoded pixels.

The pipeline runs float32 as true float32 ("ieee", every network's default): the tf32 row shows what a user's
`vae.float32_products = "tf32"` would cost.

Takes names of networks; weights are random unless `--checkpoint` (one network) gives real ones. Prints the latent's relative
error (root mean square and largest) and the PSNR of the decoded video against the float64 round trip. For comparison: storing latents as
float16 costs 2e-4 (root mean square), as bfloat16 1.7e-3.

    python benchmarks/precision.py --networks leanvae-dim16,wfvae-s,ivvae-z4
    python benchmarks/precision.py --networks leanvae-dim16 --checkpoint LeanVAE-dim16.ckpt --device cuda
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the pipeline does; libgomp reads it when torch loads

import torch

import model

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file as well as with -m
from benchmarks.machine import Machine
from model.losslessness import synthetic_video

NETWORKS = ("leanvae-dim16", "wfvae-s", "ivvae-z4")


def arithmetics(cuda: bool) -> dict[str, tuple[str, str]]:
    """Name -> (dtype of the network, its `float32_products`)."""
    known = {"float32": ("float32", "ieee"), "bfloat16": ("bfloat16", "ieee"), "float16": ("float16", "ieee")}
    return {"tf32": ("float32", "tf32"), **known} if cuda else known


def round_trip(vae: Any, video: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and decoded video, float64 on the CPU."""
    mean = vae.encode(video)[0].mean
    return mean.double().cpu(), vae.decode(mean)[0].double().cpu()


def psnr(got: torch.Tensor, want: torch.Tensor, value_range: tuple[float, float]) -> float:
    mse = (got - want).square().mean().item()
    return math.inf if mse == 0 else 10 * math.log10((value_range[1] - value_range[0]) ** 2 / mse)


def report(name: str, args: argparse.Namespace, machine: Machine) -> list[dict[str, Any]]:
    how = {"checkpoint": args.checkpoint} if args.checkpoint else {"untrained": args.seed}
    height, width = (int(side) for side in args.size.split("x"))
    exact = model.load(name, device=machine.device, dtype="float64", **how)
    video = synthetic_video(exact, args.seed, 1, args.groups, height, width).to(machine.device)
    latent, decoded = round_trip(exact, video.double())
    del exact
    rows = []
    for arithmetic, (dtype, products) in arithmetics(machine.cuda).items():
        vae = model.load(name, device=machine.device, dtype=dtype, **how)
        vae.float32_products = products
        got, again = round_trip(vae, video)
        error = got - latent
        rows.append(
            {
                "network": vae.spec.network,
                "arithmetic": arithmetic,
                "rms": float(error.square().mean().sqrt() / latent.square().mean().sqrt()),
                "largest": float(error.abs().max() / latent.abs().max()),
                "psnr_db": psnr(again, decoded, vae.spec.value_range),
                "finite": bool(got.isfinite().all() and again.isfinite().all()),
            }
        )
        row = rows[-1]
        print(
            f"{row['network']:<16}{arithmetic:<10}{row['rms']:>10.1e}{row['largest']:>10.1e}{row['psnr_db']:>10.1f}"
            + ("" if row["finite"] else "  NOT FINITE"),
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Exactness of each arithmetic.")
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--checkpoint", help="real weights, for one network")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", default="64x64")
    parser.add_argument("--groups", type=int, default=2, help="groups of frames after the first")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    machine = Machine(args.device, args.threads)
    origin = args.checkpoint or f"random weights, seed {args.seed}"
    print(f"{machine.name}; torch {torch.__version__}; {origin}; against float64")
    print(f"{'network':<16}{'compute':<10}{'rms':>10}{'largest':>10}{'PSNR dB':>10}")
    rows = [row for name in args.networks.split(",") for row in report(name, args, machine)]
    if args.json:
        args.json.write_text(json.dumps({"machine": machine.name, "weights": origin, "rows": rows}, indent=1))


if __name__ == "__main__":
    sys.exit(main())
