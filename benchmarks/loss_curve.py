"""Draws a training run as a PNG: PSNR of its training clips and learning rate over steps.

Takes `run.json` of published weights (by default those that come with Lathe). Needs the extra `training`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from model.checkpoint import EMBEDDED

SHIPPED = EMBEDDED / "leanvae-mini-dim16" / "run.json"

SMOOTH = 6  # points to either side


def draw(run: dict, path: Path) -> None:
    """`run`: as `model.training.run_folder` publishes it."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    curve = run["loss"]
    steps = [point["step"] for point in curve]
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 5), sharex=True, height_ratios=[3, 1], layout="constrained")
    psnr = [point["psnr"] for point in curve]
    above.plot(steps, psnr, color="tab:blue", alpha=0.3)  # clips differ more than a network does between two points
    above.plot(steps, [smooth(psnr, place) for place in range(len(psnr))], color="tab:blue")
    above.set_ylabel("PSNR of training clips, dB")
    below.plot(steps, [point["learning_rate"] for point in curve], color="tab:grey")
    below.set_ylabel("learning rate")
    below.set_xlabel("step")
    for axis in (above, below):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def smooth(values: list[float], place: int) -> float:
    """Mean of a value and its neighbours, fewer at the ends."""
    around = values[max(0, place - SMOOTH) : place + SMOOTH + 1]
    return sum(around) / len(around)


def main() -> None:
    """Prints where the picture is, and how far the run came."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", nargs="?", type=Path, default=SHIPPED, help="run.json of published weights")
    parser.add_argument("--out", type=Path, default=Path("loss.png"))
    arguments = parser.parse_args()
    run = json.loads(arguments.run.read_text())
    draw(run, arguments.out)
    psnr = [point["psnr"] for point in run["loss"]]
    first, last = smooth(psnr, 0), smooth(psnr, len(psnr) - 1)
    print(f"{run['steps']} steps: {first:.2f} dB -> {last:.2f} dB ({last - first:+.2f}); {arguments.out}")


if __name__ == "__main__":
    main()
